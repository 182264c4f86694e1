"""What is measured: one `Case` a row of the table.

prompt lengths x generation lengths x depths x batches -> cases
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flashformer.errors import UsageError
from flashformer.plan.machine import MAX_BATCH

MAX_TOKENS = 1 << 20


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


def slot_positions(cases: Sequence[Case]) -> list[int]:
    """Positions that each sequence of the largest batch needs."""
    return [
        max(case.context for case in cases if case.batch > slot)
        for slot in range(max(case.batch for case in cases))
    ]


def make_cases(
    prompts: list[int], generations: list[int], depths: list[int], batches: list[int]
) -> list[Case]:
    """Every combination, prompts first; a length of 0 switches a test off."""
    for name, values, least, most in (
        ("-p", prompts, 0, MAX_TOKENS),
        ("-n", generations, 0, MAX_TOKENS),
        ("-d", depths, 0, MAX_TOKENS),
        ("-b", batches, 1, MAX_BATCH),
    ):
        if not least <= min(values) <= max(values) <= most:
            raise UsageError(f"{name} takes numbers from {least} to {most}, separated by commas")
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
