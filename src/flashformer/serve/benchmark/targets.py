"""What a suite measures and what it aims at: one `Target` a row of its table.

name of a suite -> `Target`s, those of one model and format side by side
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from flashformer.errors import UsageError
from flashformer.model.shapes import SHAPES
from flashformer.serve.benchmark.cases import Case

TOKENS = 128  # of a run: one launch, timed as a whole
BATCH_CONTEXT = 1024
SHARE, STEP_RATIO, JITTER = "share", "step ratio", "jitter"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as it lies in memory: what rows share."""

    shape: str  # a key of SHAPES
    format: str
    head_format: str


@dataclass(frozen=True, slots=True)
class Target:
    """One row.

    `what` is compared with `bound`:
    share       bytes of a step / its time / read bandwidth of the same run, at least the bound
    step ratio  time of a step, without that of reading the further keys and values at the read
                bandwidth, over that of a step of one sequence, at most the bound
    jitter      99th percentile of the times between tokens over their median, at most the bound
    """

    name: str
    loaded: Loaded
    case: Case
    what: str
    bound: float | None  # None: there is no target

    def met(self, value: float) -> bool | None:
        """Whether a measured value is good enough."""
        if self.bound is None:
            return None
        return value >= self.bound if self.what == SHARE else value <= self.bound


def _case(loaded: Loaded, context: int, batch: int = 1) -> Case:
    longest = SHAPES[loaded.shape]["max_position_embeddings"]
    return Case("tg", TOKENS, min(context, longest - TOKENS), batch)


def _shares(name: str, loaded: Loaded, bounds: Mapping[int, float]) -> Iterator[Target]:
    for context, bound in bounds.items():
        yield Target(f"{name}-c{context}", loaded, _case(loaded, context), SHARE, bound)


def _ratios(name: str, loaded: Loaded, bounds: Mapping[int, float]) -> Iterator[Target]:
    yield Target(f"{name}-b1", loaded, _case(loaded, BATCH_CONTEXT), SHARE, None)
    for batch, bound in bounds.items():
        case = _case(loaded, BATCH_CONTEXT, batch)
        yield Target(f"{name}-b{batch}", loaded, case, STEP_RATIO, bound)


_8B = Loaded("llama-3.1-8b", "bf16", "bf16")
_1B = Loaded("llama-3.2-1b", "bf16", "bf16")
SUITES: dict[str, tuple[Target, ...]] = {
    "h200": (
        *_shares("8b-bf16", _8B, {128: 0.96, 8192: 0.92, 32768: 0.90, 131072: 0.88}),
        *_ratios("8b-bf16", _8B, {2: 1.02, 4: 1.04, 8: 1.08}),
        Target("8b-bf16-jitter", _8B, _case(_8B, 128), JITTER, 1.02),
        *_shares("1b-bf16", _1B, {32: 0.91, 128: 0.91, 1024: 0.90, 4096: 0.89}),
        *_shares("3b-bf16", Loaded("llama-3.2-3b", "bf16", "bf16"), {128: 0.93}),
        *_shares("qwen3-0.6b-bf16", Loaded("qwen3-0.6b", "bf16", "bf16"), {128: 0.84}),
        *_shares("qwen3-8b-bf16", Loaded("qwen3-8b", "bf16", "bf16"), {128: 0.95}),
        *_shares("70b-int4g128", Loaded("llama-3.3-70b", "int4g128", "int8"), {128: 0.85}),
        *_shares("8b-int8", Loaded("llama-3.1-8b", "int8", "int8"), {128: 0.94}),
        *_shares("8b-fp8", Loaded("llama-3.1-8b", "fp8", "fp8"), {128: 0.94}),
        *_shares("8b-int4g128", Loaded("llama-3.1-8b", "int4g128", "int8"), {128: 0.82}),
    ),
}


def targets_of(suite: str, only: str | None) -> list[Target]:
    """The rows of a suite whose names match one of the patterns, `8b-*,1b-bf16-c32`; default: all.

    Raises `UsageError` for a suite that does not exist or a pattern that fits nothing.
    """
    if suite not in SUITES:
        raise UsageError(f"--suite takes {', '.join(SUITES)}, not {suite!r}")
    targets = SUITES[suite]
    patterns = only.split(",") if only else ["*"]
    for pattern in patterns:
        if not any(fnmatchcase(target.name, pattern) for target in targets):
            names = ", ".join(target.name for target in targets)
            raise UsageError(f"--only {pattern!r} matches no row of {suite}, which has {names}")
    return [t for t in targets if any(fnmatchcase(t.name, pattern) for pattern in patterns)]
