"""What is measured: one `Case` a row of the table.

prompt lengths x generation lengths x depths x batches -> cases
"""

from dataclasses import dataclass

from flashformer.errors import UsageError


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `tokens` tokens of a prompt in one go, or one after the other."""

    kind: str  # pp: a prompt in chunks; tg: greedy decoding, one step a token
    tokens: int
    depth: int  # positions that every sequence already holds
    batch: int  # sequences in a step; 1 for pp

    @property
    def test(self) -> str:
        """The name that llama-bench made common: pp128, tg128."""
        return f"{self.kind}{self.tokens}"

    @property
    def context(self) -> int:
        """Positions that a sequence needs."""
        return self.depth + self.tokens


def make_cases(
    prompts: list[int], generations: list[int], depths: list[int], batches: list[int]
) -> list[Case]:
    """Every combination, prompts first; a length of 0 switches a test off."""
    for name, values, least in (
        ("-p", prompts, 0),
        ("-n", generations, 0),
        ("-d", depths, 0),
        ("-b", batches, 1),
    ):
        if not values or min(values) < least:
            raise UsageError(f"{name} takes numbers of at least {least}, separated by commas")
    cases = [Case("pp", p, d, 1) for d in depths for p in prompts if p]
    cases += [Case("tg", n, d, b) for d in depths for b in batches for n in generations if n]
    if not cases:
        raise UsageError("there is nothing to measure: give -p or -n a length above 0")
    return cases


def parse_numbers(name: str, text: str) -> list[int]:
    """`"1,2,4"` -> [1, 2, 4]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{name} takes whole numbers separated by commas, such as 0,4096, not {text!r}"
        ) from None
