"""Times every case in turn, and the plain reading of memory between them.

backend + cases -> `Measured`
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.steps import Steps


@dataclass(frozen=True, slots=True)
class Measured:
    """Samples of one backend: as many of each case as there were rounds."""

    read_gb_s: list[float]  # one before every case of every round, and one at the end
    seconds: dict[Case, list[float]]


def measure(
    steps: Steps,
    cases: list[Case],
    repeats: int,
    read_bandwidth: Callable[[], float],
    progress: Callable[[str, int, int], None],
) -> Measured:
    """Run `repeats` rounds: each case once, a read of the memory before it; then from the start.

    A slow minute of the machine so falls on all cases and on the bandwidth alike, instead of on
    the one that happened to run. Every case is warmed up before the first round.
    """
    deep = [case for case in cases if case.depth]
    if deep:
        steps.fill(max(c.depth for c in deep), max(c.batch for c in deep), progress)
    for case in cases:
        steps.run(_warm_up(case))
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    reads: list[float] = []
    for number in range(repeats):
        for idx, case in enumerate(cases):
            reads.append(read_bandwidth())
            seconds[case].append(steps.run(case))
            progress("measuring", number * len(cases) + idx + 1, repeats * len(cases))
    reads.append(read_bandwidth())
    return Measured(reads, seconds)


def _warm_up(case: Case) -> Case:
    """The same code and pages with fewer tokens: a whole prompt, two tokens of decoding."""
    return case if case.kind == "pp" else replace(case, tokens=min(case.tokens, 2))
