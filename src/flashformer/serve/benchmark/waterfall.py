"""Every microsecond of a token by what the memory does in it: reading, or idle, and then why.

slices of a timeline + bytes of a token + read bandwidth -> `Part`s that add up to the token

The memory idles where the producer finds the ring full. Why it is full, the consumers of the same
CTA say: they wait for another CTA's values, or they compute more slowly than the memory reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashformer.serve.benchmark.timeline import CONSUMERS, Slice, token_us

# What the consumers of a stage wait for.
HAND_OFFS = {
    "qkv": "hand-off down → qkv",
    "attention": "hand-off qkv → attention",
    "o_proj": "hand-off attention → o_proj",
    "gate_up": "hand-off o_proj → gate_up",
    "down": "hand-off gate_up → down",
    "lm_head": "hand-off down → lm_head",
    "sample": "all CTAs meet at the token's end",
}
READING = "reading at the measured bandwidth"
BELOW = "reading below it"


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a token's time, in µs: the mean over CTAs and tokens."""

    name: str
    us: float
    idle: bool  # the memory reads nothing


@dataclass(frozen=True, slots=True)
class _Span:
    """What a consumer does for a while."""

    start: int
    end: int
    name: str


def waterfall(slices: Sequence[Slice], bytes_per_token: int, read_gb_s: float) -> list[Part]:
    """The parts of the mean token, reading first, then idling, the longest first.

    `slices` are the `whole_steps` of a timeline. Empty without a whole step.
    """
    tokens = token_us(slices)
    if not tokens:
        return []
    idle = idle_us(slices)
    reading = bytes_per_token / read_gb_s / 1e3
    below = sum(tokens) / len(tokens) - reading - sum(idle.values())
    named = sorted(idle.items(), key=lambda item: -item[1])
    return [
        Part(READING, reading, idle=False),
        Part(BELOW, below, idle=False),
        *(Part(name, us, idle=True) for name, us in named if us > 0),
    ]


def idle_us(slices: Sequence[Slice]) -> dict[str, float]:
    """µs a token in which the ring was full, of the mean CTA, by what its consumers did then."""
    consumers = [s for s in slices if s.track == CONSUMERS and s.stage != "launch"]
    steps = max((s.step for s in consumers), default=-1) + 1
    found: dict[str, float] = {}
    ctas = {s.cta for s in consumers}
    for cta in ctas:
        spans = [span for s in consumers if s.cta == cta for span in _spans(s)]
        fills = [s for s in slices if s.cta == cta and s.track != CONSUMERS]
        for fill, reasons in _overlapping(fills, spans):
            for name, ns in _shared(fill, reasons):
                found[name] = found.get(name, 0.0) + ns / 1e3 / steps / len(ctas)
    return found


def _spans(s: Slice) -> Iterator[_Span]:
    """A slice as waiting, which comes first in it, and work."""
    waited = s.end if s.kind == "wait" else min(s.end, s.start + s.packets_ns)
    if waited > s.start:
        yield _Span(s.start, waited, HAND_OFFS.get(s.stage, f"{s.stage}: waiting"))
    if s.end > waited:
        yield _Span(waited, s.end, f"{s.stage}: computing")


def _overlapping(
    fills: Sequence[Slice], spans: Sequence[_Span]
) -> Iterator[tuple[Slice, list[_Span]]]:
    """Every slice of the producer with what the consumers did meanwhile; both in order of time."""
    first = 0
    for fill in sorted(fills, key=lambda s: s.start):
        while first < len(spans) and spans[first].end <= fill.start:
            first += 1
        at, during = first, []
        while at < len(spans) and spans[at].start < fill.end:
            start, end = max(spans[at].start, fill.start), min(spans[at].end, fill.end)
            during.append(_Span(start, end, spans[at].name))
            at += 1
        yield fill, during


def _shared(fill: Slice, during: Sequence[_Span]) -> Iterator[tuple[str, float]]:
    """The time that a fill found the ring full, given to the waits in it and then to the work."""
    left = float(min(fill.ring_ns, fill.ns))
    for computing in (False, True):
        spans = [span for span in during if span.name.endswith(": computing") is computing]
        total = sum(span.end - span.start for span in spans)
        given = min(left, total)
        for span in spans if given else ():
            yield span.name, given * (span.end - span.start) / total
        left -= given


def lines(parts: Sequence[Part], read_gb_s: float) -> list[str]:
    """A line a part, in columns."""
    total = sum(part.us for part in parts) or 1.0
    idle = sum(part.us for part in parts if part.idle)
    head = f"memory: {idle:.1f} µs idle of {total:.1f} µs a token, at {read_gb_s:.0f} GB/s"
    width = max(len(part.name) for part in parts)
    return [
        f"{head}, measured in the same run",
        *(
            f"  {'idle: ' if part.idle else '      '}{part.name.ljust(width)}"
            f"  {part.us:8.1f} µs  {part.us / total:6.1%}"
            for part in parts
        ),
    ]
