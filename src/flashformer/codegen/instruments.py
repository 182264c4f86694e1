"""What may be built into the CUDA kernel to look at it or to test it; nothing by default.

A timeline's moments are named here once: config.h gets them as `enum class Moment`, `flashformer
profile` reads them back.
"""

from dataclasses import dataclass

TRACKS = ("consumers", "producer")  # of a CTA's timeline: thread 0, and the producer warp


@dataclass(frozen=True, slots=True)
class Instruments:
    """Compiled into one kernel. The results are the same bits with any of them."""

    trace_moments: int = 0  # moments of each CTA and track to keep
    delay_ns: int = 0  # random sleeps of up to so long at hand-offs (`CudaStepArgs.delay_seed`)
    poison: bool = False  # shared memory, exchange and free pages hold NaN before a launch
    faults: bool = False  # `CudaStepArgs.drop_matrix` and `drop_cta` are obeyed
    every_lane_arrives: bool = False  # at barriers in shared memory, so that racecheck can follow
    counter_start: int = 0  # of the grid barrier: 0, or 2^31, from which its first use wraps


NONE = Instruments()


@dataclass(frozen=True, slots=True)
class Moment:
    """The end of a slice of a timeline."""

    name: str  # in config.h
    stage: str
    kind: str  # work | wait
    track: str  # one of TRACKS


# Slices in the order of Kind (kernel/stages.cuh), so that the kernel can add a matrix's kind.
_MATRICES = ("qkv", "o_proj", "gate_up", "down", "lm_head")
MOMENTS: tuple[Moment, ...] = (
    *(Moment(f"{name}_input", name, "wait", "consumers") for name in _MATRICES),
    *(Moment(name, name, "work", "consumers") for name in _MATRICES),
    *(Moment(f"{name}_fill", name, "work", "producer") for name in _MATRICES),
    Moment("start", "launch", "work", "consumers"),
    Moment("embed", "embed", "work", "consumers"),
    Moment("attention", "attention", "work", "consumers"),
    Moment("meet", "sample", "wait", "consumers"),
    Moment("sample", "sample", "work", "consumers"),
    Moment("first_fill", "launch", "work", "producer"),
    Moment("past_fill", "attention", "work", "producer"),
)


def render_moments() -> str:
    """The C++ definition of `Moment`."""
    return f"enum class Moment : int {{ {', '.join(m.name for m in MOMENTS)} }};"
