"""Whether the kernel that is measured computes: run before the clock, reported with the speed.

Steps -> `Checks`
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from flashformer.backends.base import Float32
from flashformer.plan.plan import Plan
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.steps import Steps, copied

PROMPT_TOKENS = 12
COMPARED_TOKENS = 32
# Of the logits' spread. float32 sums over `hidden_size` terms differ far below 1 %. Activations of
# 16 bits round by 2^-9 in every layer: on random weights that moves logits by 1.3 % (root mean
# square) behind 16 layers and by 5 % behind 32 wider ones, and the largest of 128k such lies five
# deviations out. A wrong position, page or weight moves the largest by several spreads.
ROUNDING = {"f32": 0.01, "f16": 0.01, "bf16": 0.1}
ROUNDING_A_LAYER = 0.01


def rounding_of(plan: Plan) -> float:
    """How far logits may differ that were summed in another order, in spreads of the logits."""
    least = ROUNDING[plan.machine.kv_format]
    grows = plan.machine.kv_format == "bf16"
    return max(least, ROUNDING_A_LAYER * plan.spec.num_layers) if grows else least


@dataclass(frozen=True, slots=True)
class Checks:
    """What was found; a speed is reported only if all of it holds."""

    logits_finite: bool
    logits_vary: bool  # neither all equal nor blind to the input
    repeat_bit_equal: bool  # the same step twice gives the same bits
    prompt_equals_decode: bool  # a prompt in one chunk = the same tokens one by one, to rounding
    batch_row_equals_alone: bool  # row b of a batch = the same sequence alone, bit by bit
    rounds_choose_equal_tokens: bool = True  # known after measuring

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(asdict(self).values())

    def failed(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [name for name, holds in asdict(self).items() if not holds]


def run_checks(steps: Steps, batch: int) -> Checks:
    """Run a few short steps on slots 0 .. batch - 1 and compare what must agree.

    Chunk and single steps may sum in another order, so they are compared to rounding; a wrong
    position, page or weight shifts the logits by their spread itself.
    """
    slots = np.arange(batch, dtype=np.int32)
    prompts = [steps.random_ids(PROMPT_TOKENS + 1, slot) for slot in range(batch)]
    last = np.array([prompt[-1] for prompt in prompts], np.int32)

    for slot, prompt in enumerate(prompts):
        steps.prompt(slot, 0, prompt[:-1])
    together = copied(steps.decode(last, PROMPT_TOKENS, slots))
    again = copied(steps.decode(last, PROMPT_TOKENS, slots))
    alone = [
        copied(steps.decode(last[i : i + 1], PROMPT_TOKENS, slots[i : i + 1])) for i in range(batch)
    ]
    chunk = copied(steps.prompt(0, 0, prompts[0]))[0]
    other = copied(steps.prompt(0, 0, prompts[0][::-1].copy()))[0]

    rounding = rounding_of(steps.backend.plan)
    spread = float(np.std(together[0])) if np.isfinite(together).all() else 0.0
    return Checks(
        logits_finite=bool(np.isfinite(together).all()),
        logits_vary=bool(spread > 0.0 and np.any(chunk != other)),
        repeat_bit_equal=_same_bits(together, again),
        prompt_equals_decode=bool(np.max(np.abs(chunk - together[0])) <= rounding * spread),
        batch_row_equals_alone=_same_bits(together, np.concatenate(alone)),
    )


def batch_chooses_as_alone(steps: Steps, case: Case) -> bool:
    """Whether the sequences of a batch go on as each of them alone does, for a few tokens."""
    case = replace(case, tokens=min(case.tokens, COMPARED_TOKENS))
    slots = np.arange(case.batch, dtype=np.int32)
    together = np.array(list(steps.generate(case, slots)))
    return all(
        np.array_equal(list(steps.generate(case, slots[i : i + 1])), together[:, i : i + 1])
        for i in range(case.batch)
    )


def _same_bits(a: Float32, b: Float32) -> bool:
    return a.tobytes() == b.tobytes()
