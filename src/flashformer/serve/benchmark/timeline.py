"""Where a token's time goes on the GPU: the kernel's own moments as slices, a table and a trace.

words [num_ctas, tracks, moments, 2] -> `Slice`s -> rows of a table | Chrome trace events
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from flashformer.codegen.instruments import MOMENTS, TRACKS

Words = npt.NDArray[np.uint64]
CONSUMERS = TRACKS[0]
WRAP = 1 << 48


@dataclass(frozen=True, slots=True)
class Slice:
    """What one CTA did between two moments; times in ns from the launch's first moment."""

    cta: int
    track: str
    stage: str
    kind: str  # work | wait
    layer: int
    step: int
    start: int
    end: int
    ring_ns: int  # of it, waiting for the ring: empty (consumers), full (producer)
    packets_ns: int  # waiting for packets of other CTAs (consumers), for copies to land (producer)

    @property
    def ns(self) -> int:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of a token, all its layers together, in µs."""

    stage: str
    calls: int  # of a token
    work_us: float  # median over the CTAs
    work_max_us: float
    wait_us: float
    wait_max_us: float
    ring_us: float  # of the work, for want of bytes
    share: float  # of the token

    @property
    def total_us(self) -> float:
        """Median work and wait."""
        return self.work_us + self.wait_us


def slices_of(words: Words) -> list[Slice]:
    """The slices of all CTAs and tracks, in the order of their ends.

    A word holds the time, the layer and the moment; its neighbour the time waited since the moment
    before (kernel/cta.cuh, `Cta::trace`). A moment is the end of a slice; the first has no slice.
    """
    used = words[..., 0] != 0
    if not used.any():
        return []
    # 48 bits of nanoseconds wrap every three days: count from a moment of this launch.
    origin = int(words[..., 0][used][0] >> np.uint64(16))
    since = (words[..., 0][used] >> np.uint64(16)).astype(np.int64) - origin
    origin += int(((since + WRAP // 2) % WRAP - WRAP // 2).min())
    found: list[Slice] = []
    for cta, track in np.ndindex(words.shape[:2]):
        count = int(used[cta, track].sum())
        found += _track(cta, TRACKS[track], words[cta, track, :count], origin)
    return found


def _track(cta: int, track: str, words: Words, origin: int) -> Iterator[Slice]:
    before = step = 0
    for number, (word, waited) in enumerate(words.tolist()):
        moment, layer = MOMENTS[word & 255], word >> 8 & 255
        end = ((word >> 16) - origin) % WRAP
        if number:
            ring, packets = waited & 0xFFFFFFFF, waited >> 32
            yield Slice(
                cta, track, moment.stage, moment.kind, layer, step, before, end, ring, packets
            )
        before = end
        ends_step = ("sample",) if track == CONSUMERS else ("lm_head_fill",)
        step += moment.name in ends_step


def whole_steps(slices: Sequence[Slice]) -> list[Slice]:
    """Without steps that some CTA has not finished, and without the first if there are more.

    The first step of a launch waits for the ring to fill; later ones are what decoding is made of.
    """
    ends = [s for s in slices if s.track == CONSUMERS and (s.stage, s.kind) == ("sample", "work")]
    last = {s.cta: s.step for s in ends}  # slices of a track come in order
    finished = min(last.values(), default=-1)
    first = 1 if finished > 0 else 0
    return [replace(s, step=s.step - first) for s in slices if first <= s.step <= finished]


def stage_times(slices: Sequence[Slice]) -> list[StageTime]:
    """One row a stage, in the order of a token; of `whole_steps`."""
    consumers = [s for s in slices if s.track == CONSUMERS and s.stage != "launch"]
    steps = max((s.step for s in consumers), default=-1) + 1
    ctas = sorted({s.cta for s in consumers})
    stages = list(dict.fromkeys(s.stage for s in consumers))
    times = {
        stage: _sums([s for s in consumers if s.stage == stage], ctas, steps) for stage in stages
    }
    total = sum(median(t["work"]) + median(t["wait"]) for t in times.values()) or 1.0
    return [
        StageTime(
            stage=stage,
            calls=len({s.layer for s in consumers if s.stage == stage}),
            work_us=median(t["work"]),
            work_max_us=max(t["work"]),
            wait_us=median(t["wait"]),
            wait_max_us=max(t["wait"]),
            ring_us=median(t["ring"]),
            share=(median(t["work"]) + median(t["wait"])) / total,
        )
        for stage, t in times.items()
    ]


def _sums(slices: Sequence[Slice], ctas: list[int], steps: int) -> dict[str, list[float]]:
    """µs a token of every CTA: work, wait (whole slices, and for packets inside work), ring."""
    place = {cta: i for i, cta in enumerate(ctas)}
    sums = {name: [0.0] * len(ctas) for name in ("work", "wait", "ring")}
    for s in slices:
        i = place[s.cta]
        waited = s.ns if s.kind == "wait" else min(s.packets_ns, s.ns)
        sums["wait"][i] += waited / 1e3 / steps
        sums["work"][i] += (s.ns - waited) / 1e3 / steps
        sums["ring"][i] += min(s.ring_ns, s.ns) / 1e3 / steps
    return sums


def token_us(slices: Sequence[Slice]) -> list[float]:
    """Wall time of every whole step, from the end of the one before."""
    ends: dict[int, int] = {}
    starts: dict[int, int] = {}
    for s in slices:
        if s.track == CONSUMERS and s.stage != "launch":
            ends[s.step] = max(ends.get(s.step, 0), s.end)
            starts[s.step] = min(starts.get(s.step, s.start), s.start)
    return [(ends[step] - starts[step]) / 1e3 for step in sorted(ends)]


def producer_us(slices: Sequence[Slice]) -> dict[str, float]:
    """µs a token of the median producer: ring full, copies on their way, all of it."""
    producer = [s for s in slices if s.track != CONSUMERS and s.stage != "launch"]
    steps = max((s.step for s in producer), default=-1) + 1
    ctas = {s.cta for s in producer}

    def of(value: Callable[[Slice], int]) -> float:
        sums = [sum(value(s) for s in producer if s.cta == cta) for cta in ctas]
        return median(sums) / 1e3 / steps if sums else 0.0

    return {
        "ring_full": of(lambda s: s.ring_ns),
        "copies_under_way": of(lambda s: s.packets_ns),
        "all": of(lambda s: s.ns),
    }


def chrome_trace(slices: Sequence[Slice], name: str) -> dict[str, Any]:
    """Trace Event Format (for ui.perfetto.dev and chrome://tracing): one track an SM.

    The consumers are one process, the producers another. A slice is a stage, waits are slices of
    their own, and the time waited inside a slice is among its arguments.
    """
    events: list[dict[str, Any]] = []
    for process, track in enumerate(TRACKS):
        events.append(_metadata("process_name", process, 0, track))
        for cta in sorted({s.cta for s in slices}):
            events.append(_metadata("thread_name", process, cta, f"SM of CTA {cta}"))
    for s in slices:
        wait = "wait: " if s.kind == "wait" else ""
        events.append(
            {
                "name": f"{wait}{s.stage}",
                "cat": s.kind,
                "ph": "X",
                "pid": TRACKS.index(s.track),
                "tid": s.cta,
                "ts": s.start / 1e3,
                "dur": s.ns / 1e3,
                "args": {
                    "layer": s.layer,
                    "step": s.step,
                    "ring_us": s.ring_ns / 1e3,
                    "packets_us": s.packets_ns / 1e3,
                },
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"name": name}}


def _metadata(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": {"name": value}}
