"""Vector clocks (Fidge 1988, Mattern 1989): which event of a launch comes after which.

A clock has two rows: what an event depends on, through packets and waits, and what it sees, through
release and acquire.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flashformer.backends.cuda.geometry import Rect
from flashformer.backends.cuda.program import Buffer, Event, Read, Write

Ints = npt.NDArray[np.int32]
DEPENDS, SEES = range(2)  # rows of a clock
NOT_YET, BEFORE, NEVER = -1, -2, -3  # written: later, before the launch, not in this launch


@dataclass(slots=True)
class Process:
    """One sequence of events, and how far it has come."""

    idx: int
    name: str
    events: list[Event]
    clock: Ints  # [2, processes]: events of each process that are known
    at: int = 0
    moved: int = 0  # items of the current Put or Get

    def join(self, other: "Stamp", *, sees: bool) -> None:
        """After `other`; `sees`: by release and acquire."""
        rows = slice(DEPENDS, SEES + 1) if sees else slice(DEPENDS, DEPENDS + 1)
        clock = self.clock.copy()
        np.maximum(clock[rows], other.clock[rows], out=clock[rows])
        clock[rows, other.process] = np.maximum(clock[rows, other.process], other.number)
        self.clock = clock

    def stamp(self) -> "Stamp":
        """The current event, with all that it knows."""
        return Stamp(self.idx, self.at + 1, self.clock)


@dataclass(frozen=True, slots=True)
class Stamp:
    """An event: which one, and what was known."""

    process: int
    number: int  # from 1
    clock: Ints


@dataclass(slots=True)
class Use:
    """A buffer in one of its uses."""

    writer: Ints  # [rows, width]: index in `writes`, or NOT_YET, BEFORE, NEVER
    missing: int
    writes: list[tuple[Stamp, Write]] = field(default_factory=list)
    reads: list[tuple[Stamp, Read]] = field(default_factory=list)
    sources: dict[Rect, tuple[Ints, Ints, Ints]] = field(default_factory=dict)

    def written(self, rect: Rect) -> bool:
        """Whether every place has its value."""
        part = self._part(rect)
        return self.missing == 0 or bool(((part >= 0) | (part == BEFORE)).all())

    def _part(self, rect: Rect) -> Ints:
        return self.writer[rect.row : rect.row_end, rect.place : rect.place_end]

    def sources_of(self, rect: Rect) -> tuple[Ints, Ints, Ints]:
        """Process and number of all writes to the places, and the dependencies of all of them."""
        if rect not in self.sources:
            stamps = [self.writes[i][0] for i in np.unique(self._part(rect)) if i >= 0]
            processes = np.array([s.process for s in stamps], np.int32)
            numbers = np.array([s.number for s in stamps], np.int32)
            joined = np.zeros_like(stamps[0].clock[DEPENDS]) if stamps else np.zeros(0, np.int32)
            if stamps:
                joined = np.maximum.reduce([s.clock[DEPENDS] for s in stamps])
                np.maximum.at(joined, processes, numbers)
            self.sources[rect] = processes, numbers, joined
        return self.sources[rect]


@dataclass(slots=True)
class Channel:
    """A queue between two roles of a CTA."""

    capacity: int
    put: int = 0
    got: int = 0
    stamps: deque[tuple[int, Stamp]] = field(default_factory=deque)  # items before, and the Put
    blocked: Process | None = None  # in the middle of a Put or a Get


def new_use(shape: Buffer) -> Use:
    """A buffer before a use."""
    writer = np.full((shape.rows, shape.width), NOT_YET, np.int32)
    for row, existing in enumerate(shape.existing):
        writer[row, :existing] = BEFORE
        writer[row, existing + shape.new :] = NEVER
    return Use(writer, int((writer == NOT_YET).sum()))


def after(later: Stamp, earlier: Stamp) -> bool:
    """Whether an event depends on another."""
    if later.process == earlier.process:
        return later.number > earlier.number
    return bool(later.clock[DEPENDS, earlier.process] >= earlier.number)


def covered(whole: Rect, rects: set[Rect]) -> bool:
    """Whether the rectangles cover all of one."""
    missing = np.ones((whole.row_end, whole.place_end), bool)
    for rect in rects:
        missing[rect.row : rect.row_end, rect.place : rect.place_end] = False
    return not missing[whole.row :, whole.place :].any()


def ordered(later: list[Stamp], earlier: list[Stamp]) -> npt.NDArray[np.bool_]:
    """[later, earlier]: whether an event depends on another."""
    processes = np.array([s.process for s in earlier], np.int32)
    numbers = np.array([s.number for s in earlier], np.int32)
    clocks = np.stack([s.clock[DEPENDS] for s in later])[:, processes]
    own = np.array([s.process for s in later])[:, None] == processes
    clocks = np.where(own, np.array([s.number - 1 for s in later])[:, None], clocks)
    return clocks >= numbers


def overlaps(a: list[Rect], b: list[Rect]) -> npt.NDArray[np.bool_]:
    """[a, b]: whether two rectangles share a place."""
    x, y = np.array(a)[:, None], np.array(b)[None]
    rows = (x[..., 0] < y[..., 1]) & (y[..., 0] < x[..., 1])
    return rows & (x[..., 2] < y[..., 3]) & (y[..., 2] < x[..., 3])
