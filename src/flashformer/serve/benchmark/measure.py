"""Times every case in turn, and the plain reading of memory between them.

backend + cases -> `Measured`
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flashformer.backends.base import Int32
from flashformer.plan.pack import Progress
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.steps import Steps


@dataclass(frozen=True, slots=True)
class Measured:
    """Samples of one backend: as many of each case as there were rounds."""

    read_gb_s: list[float]  # one before every case of every round, and one at the end
    seconds: dict[Case, list[float]]
    tokens_equal: bool  # every round of a case chose the same tokens


def measure(
    steps: Steps,
    cases: list[Case],
    repeats: int,
    read_bandwidth: Callable[[], float],
    progress: Progress,
) -> Measured:
    """Run `repeats` rounds: each case once, a read of the memory before it; then from the start.

    A slow minute of the machine so falls on all cases and on the bandwidth alike, instead of on
    the one that happened to run. Every case is warmed up before the first round. The shallow ones
    come first: what they leave in the pages is then the same for the deeper ones in every round.
    """
    cases = sorted(cases, key=lambda case: case.depth)
    slots = range(max(case.batch for case in cases))
    steps.fill([max(c.depth for c in cases if c.batch > slot) for slot in slots], progress)
    for case in cases:
        steps.run(_warm_up(case))
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    tokens: dict[Case, Int32] = {}
    tokens_equal = True
    reads: list[float] = []
    for number in range(repeats):
        for idx, case in enumerate(cases):
            reads.append(read_bandwidth())
            run = steps.run(case)
            seconds[case].append(run.seconds)
            first = tokens.setdefault(case, run.tokens)
            tokens_equal = tokens_equal and np.array_equal(run.tokens, first)
            progress("measuring", number * len(cases) + idx + 1, repeats * len(cases))
    reads.append(read_bandwidth())
    return Measured(reads, seconds, tokens_equal)


def _warm_up(case: Case) -> Case:
    """The same code and pages with fewer tokens: a whole prompt, two tokens of decoding."""
    return case if case.kind == "pp" else replace(case, tokens=min(case.tokens, 2))
