"""Proves of a `Program` that it runs to its end, and that every read finds what it should.

The program is run to a fixpoint: its waits only ever become true, so one order of events stands for
all. A value without a tag may only be read by an event that sees its write; a place may only be
written again by an event that depends on its readers, for what a reader has read it has used before
it sends anything on.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from flashformer.backends.cuda.clocks import (
    DEPENDS,
    NOT_YET,
    SEES,
    Channel,
    Ints,
    Process,
    Stamp,
    Use,
    after,
    covered,
    new_use,
    ordered,
    overlaps,
)
from flashformer.backends.cuda.geometry import Rect
from flashformer.backends.cuda.program import (
    ROLES,
    Arrive,
    Buffer,
    Get,
    Meet,
    Program,
    Put,
    Read,
    Where,
    Write,
)
from flashformer.errors import PlanError

NEAR = 8  # events of one unit of attention, at most


def check_program(program: Program) -> None:
    """Raise `PlanError` for the first thing that could go wrong, or return."""
    _check_channels(program)
    _check_counts(program)
    run = _Run(program)
    run.to_fixpoint()
    run.check_coverage()
    run.check_reuse()
    run.check_inputs()


def _require(condition: bool, sentence: Callable[[], str] | str) -> None:
    if not condition:
        _fail(sentence if isinstance(sentence, str) else sentence())


def _fail(sentence: str) -> NoReturn:
    raise PlanError(f"The CUDA program is wrong: {sentence}.")


def _check_channels(program: Program) -> None:
    """Both ends of every channel move the same items in the same order."""
    streamed: dict[Where, int] = {}
    for cta, roles in enumerate(program.roles):
        ends: dict[tuple[str, type], list[Any]] = {}
        owners: dict[tuple[str, type], int] = {}
        for role, events in enumerate(roles):
            for event in events:
                if not isinstance(event, Put | Get):
                    continue
                key = event.channel, type(event)
                _require(
                    owners.setdefault(key, role) == role and event.items > 0,
                    f"two roles of CTA {cta} share one end of {event.channel!r}, or move nothing",
                )
                ends.setdefault(key, []).append((event.where, event.items, event.nbytes))
                _require(
                    event.nbytes <= event.items * program.slot_bytes,
                    f"a fill of CTA {cta} at {event.where} is larger than a slot",
                )
                if event.channel == "ring" and isinstance(event, Put):
                    streamed[event.where] = streamed.get(event.where, 0) + event.nbytes
        for channel in {channel for channel, _ in ends}:
            _require(
                ends.get((channel, Put)) == ends.get((channel, Get)),
                f"the two ends of {channel!r} in CTA {cta} differ in items or bytes",
            )
    for where, nbytes in streamed.items():
        expected = program.stage_bytes.get(where.stage, nbytes)
        _require(
            nbytes == expected,
            f"{where} streams {nbytes} bytes; the matrix has {expected}",
        )


def _check_counts(program: Program) -> None:
    """Every CTA comes to every barrier once; every counter is met for as many as arrive."""
    arrivals: dict[tuple[str, int], list[int]] = {}
    meets: dict[tuple[str, int], set[int]] = {}
    for number, (_, events) in enumerate(program.processes):
        for event in events:
            if isinstance(event, Arrive):
                arrivals.setdefault((event.counter, event.use), []).append(number // len(ROLES))
            elif isinstance(event, Meet):
                meets.setdefault((event.counter, event.use), set()).add(event.number)
    for (counter, use), ctas in arrivals.items():
        if counter == "step":
            _require(
                sorted(ctas) == list(range(len(program.roles))),
                f"not every CTA comes exactly once to the barrier of step {use}",
            )
        _require(
            meets.get((counter, use)) == {len(ctas)},
            f"{len(ctas)} arrive at {counter!r} for the {use}-th time, others are waited for",
        )
    _require(meets.keys() <= arrivals.keys(), "a counter is waited for at which nobody arrives")


class _Run:
    """The program on its way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        named = program.processes
        self.processes = [
            Process(i, name, events, np.zeros((2, len(named)), np.int32))
            for i, (name, events) in enumerate(named)
        ]
        self.uses: dict[tuple[str, int], Use] = {}
        self.channels: dict[tuple[int, str], Channel] = {}
        self.arrived: dict[tuple[str, int], list[Stamp]] = {}
        self.met: dict[tuple[str, int], list[Stamp]] = {}
        self.joined: dict[tuple[str, int], Ints] = {}  # what those who arrived know together
        self.waiting: dict[Any, list[Process]] = {}
        self.ready = deque(self.processes)
        self.inputs: dict[tuple[int, Where], list[tuple[Stamp, Read]]] = {}  # by CTA

    def to_fixpoint(self) -> None:
        """Run every process as far as it comes; all must come to their ends."""
        steps = {
            Put: self._put, Get: self._get, Write: self._write,
            Read: self._read, Arrive: self._arrive, Meet: self._meet,
        }  # fmt: skip
        while self.ready:
            process = self.ready.popleft()
            events = process.events
            while process.at < len(events):
                event = events[process.at]
                resource = steps[type(event)](process, event)  # type: ignore[operator]
                if resource is not None:
                    self.waiting.setdefault(resource, []).append(process)
                    break
                process.at += 1
        for process in self.processes:
            if process.at < len(process.events):
                event = process.events[process.at]
                what = event[1]
                raise PlanError(
                    f"The CUDA program is wrong: {process.name} waits for ever at "
                    f"{event.where}, for {what!r}."
                )

    def _wake(self, resource: Any) -> None:
        self.ready.extend(self.waiting.pop(resource, ()))

    def _channel(self, process: Process, name: str) -> tuple[tuple[int, str], Channel]:
        key = process.idx // len(ROLES), name
        if key not in self.channels:
            self.channels[key] = Channel(self.program.capacities[name])
        return key, self.channels[key]

    def _put(self, process: Process, event: Put) -> Any:
        key, channel = self._channel(process, event.channel)
        if process.moved == 0:
            channel.stamps.append((channel.put, process.stamp()))
        room = channel.capacity - channel.put + channel.got
        count = min(event.items - process.moved, room)
        channel.put += count
        return self._moved(process, event, key, channel, count)

    def _get(self, process: Process, event: Get) -> Any:
        key, channel = self._channel(process, event.channel)
        there = channel.put - channel.got
        wanted = event.items - process.moved
        sender = channel.blocked
        if wanted > there and sender is not None and sender is not process:
            # What a waiting Put still holds follows as room is made.
            follows = min(sender.events[sender.at].items - sender.moved, wanted - there)  # type: ignore[union-attr]
            channel.put += follows
            sender.moved += follows
            there += follows
        count = min(wanted, there)
        channel.got += count
        blocked = self._moved(process, event, key, channel, count)
        if blocked is None:
            while len(channel.stamps) > 1 and channel.stamps[1][0] < channel.got:
                channel.stamps.popleft()
            process.join(channel.stamps[0][1], sees=True)
        return blocked

    def _moved(
        self, process: Process, event: Put | Get, key: Any, channel: Channel, count: int
    ) -> Any:
        process.moved += count
        if count and channel.blocked is not None and channel.blocked is not process:
            channel.blocked = None
            self._wake(key)
        if process.moved < event.items:
            channel.blocked = process
            return key
        process.moved = 0
        return None

    def _use(self, buffer: str, use: int) -> Use:
        if (buffer, use) not in self.uses:
            shape = self.program.buffers[buffer]
            self.uses[buffer, use] = new_use(shape)
        return self.uses[buffer, use]

    def _write(self, process: Process, event: Write) -> None:
        _require_inside(process, event, self.program.buffers)
        use, rect = self._use(event.buffer, event.use), event.rect
        part = use.writer[rect.row : rect.row_end, rect.place : rect.place_end]
        _require(
            bool((part == NOT_YET).all()),
            lambda: (
                f"{process.name} writes wrong places of {event.buffer!r}, or twice, at "
                f"{event.where}"
            ),
        )
        part[...] = len(use.writes)
        use.missing -= part.size
        use.writes.append((process.stamp(), event))
        if use.missing == 0 or not self.program.buffers[event.buffer].complete:
            self._wake((event.buffer, event.use))
        self._wake((event.buffer, event.use, "part"))

    def _read(self, process: Process, event: Read) -> Any:
        _require_inside(process, event, self.program.buffers)
        buffer, rect = self.program.buffers[event.buffer], event.rect
        use = self._use(event.buffer, event.use)
        if not use.written(rect):
            _require(
                event.waits,
                lambda: (
                    f"{process.name} reads {event.buffer!r} at {event.where} before it is written"
                ),
            )
            whole = rect == (0, buffer.rows, 0, buffer.width)
            return (event.buffer, event.use) if whole else (event.buffer, event.use, "part")
        processes, numbers, joined = use.sources_of(rect)
        if event.waits:
            self._check_tag(process, event)
            clock = process.clock.copy()
            np.maximum(clock[DEPENDS], joined, out=clock[DEPENDS])
            process.clock = clock
        else:
            _require(
                bool((self._known(process, SEES, processes) >= numbers).all()),
                lambda: (
                    f"{process.name} reads {event.buffer!r} at {event.where} without "
                    "being ordered after its write"
                ),
            )
        stamp = process.stamp()
        use.reads.append((stamp, event))
        key = process.idx // len(ROLES), event.where
        self.inputs.setdefault(key, []).append((stamp, event))
        return None

    def _known(self, process: Process, row: int, processes: Ints) -> Ints:
        known: Ints = process.clock[row, processes]
        known[processes == process.idx] = process.at
        return known

    def _check_tag(self, process: Process, event: Read) -> None:
        """A tag of one bit tells a use from the one before, if that one is known to be there."""
        _require(
            self.program.buffers[event.buffer].tagged,
            lambda: f"{process.name} waits for a tag of {event.buffer!r}, which has none",
        )
        if event.use == 0 or self.program.buffers[event.buffer].dated:
            return
        before = self.uses.get((event.buffer, event.use - 1))
        known = before is not None and before.written(event.rect)
        if known and before is not None:
            processes, numbers, _ = before.sources_of(event.rect)
            known = bool((self._known(process, DEPENDS, processes) >= numbers).all())
        _require(
            known,
            lambda: (
                f"{process.name} may take an old packet of {event.buffer!r} for a new one at "
                f"{event.where}"
            ),
        )

    def _arrive(self, process: Process, event: Arrive) -> None:
        self.arrived.setdefault((event.counter, event.use), []).append(process.stamp())
        self._wake((event.counter, event.use))

    def _meet(self, process: Process, event: Meet) -> Any:
        stamps = self.arrived.get((event.counter, event.use), [])
        if len(stamps) < event.number:
            return event.counter, event.use
        met = self.met.setdefault((event.counter, event.use), [])
        if not met:
            joined = np.maximum.reduce([s.clock for s in stamps])
            for stamp in stamps:
                joined[:, stamp.process] = np.maximum(joined[:, stamp.process], stamp.number)
            self.joined[event.counter, event.use] = joined
        process.clock = np.maximum(process.clock, self.joined[event.counter, event.use])
        met.append(process.stamp())
        return None

    def check_coverage(self) -> None:
        """Every place has been written, and what was written has been read."""
        for (name, number), use in self.uses.items():
            buffer = self.program.buffers[name]
            _require(
                use.missing == 0 or not buffer.complete,
                f"places of {name!r} are never written in use {number}",
            )
            if not buffer.tagged:
                continue
            unread = (use.writer >= 0) & (np.arange(buffer.width) < buffer.width - buffer.padding)
            for rect in {read.rect for _, read in use.reads}:
                unread[rect.row : rect.row_end, rect.place : rect.place_end] = False
            _require(not unread.any(), f"places of {name!r} are never read in use {number}")

    def check_reuse(self) -> None:
        """A place is written again only after everybody who read it before."""
        for (name, number), use in self.uses.items():
            first = max(0, number - 1) if self.program.buffers[name].complete else 0
            for before in (self.uses.get((name, n)) for n in range(first, number)):
                if before is not None and before.reads and use.writes:
                    self._check_readers_done(name, number, use, before)
        for (counter, number), stamps in self.arrived.items():
            met = self.met.get((counter, number - 1), [])
            _require(
                not met or bool(ordered(stamps, met).all()),
                f"{counter!r} is counted up for the {number}-th time while it may still be met",
            )

    @staticmethod
    def _check_readers_done(name: str, number: int, use: Use, before: Use) -> None:
        done = ordered([w[0] for w in use.writes], [r[0] for r in before.reads])
        apart = ~overlaps([w.rect for _, w in use.writes], [r.rect for _, r in before.reads])
        _require(
            bool((done | apart).all()),
            f"{name!r} is written for use {number} while it may still be read",
        )

    def check_inputs(self) -> None:
        """What a CTA sends depends on all that it is made of."""
        for use in self.uses.values():
            for stamp, write in use.writes:
                embedded = write.where.stage == "qkv" and write.where.layer == 0
                if write.where.stage in self.program.inputs and not embedded:
                    self._check_stage(stamp.process // len(ROLES), write.where, stamp)
                for buffer, rect in write.sources:
                    self._check_source(stamp, write, buffer, rect)
        for cta, (consumers, _, _) in enumerate(self.program.roles):
            for where in {event.where for event in consumers if event.where.stage == "sample"}:
                self._check_stage(cta, where, None)

    def _check_stage(self, cta: int, where: Where, stamp: Stamp | None) -> None:
        reads = self.inputs.get((cta, where), [])
        for name, whole in self.program.inputs[where.stage].items():
            rects = {read.rect for _, read in reads if read.buffer == name}
            if whole not in rects and not covered(whole, rects):
                _fail(f"CTA {cta} does not read all of {name!r} at {where}")
        for read_stamp, read in reads:
            if stamp is not None and not after(stamp, read_stamp):
                _fail(f"CTA {cta} sends the result of {where} before it reads {read.buffer!r}")

    def _check_source(self, stamp: Stamp, write: Write, buffer: str, rect: Rect) -> None:
        """The process has just read it."""
        for read_stamp, read in self.inputs.get((stamp.process // len(ROLES), write.where), []):
            near = 0 < stamp.number - read_stamp.number < NEAR
            if (
                near
                and read_stamp.process == stamp.process
                and (read.buffer, read.rect) == (buffer, rect)
            ):
                return
        _fail(f"a result of {write.where} is sent without its part of {buffer!r}")


def _require_inside(process: Process, event: Write | Read, buffers: dict[str, Buffer]) -> None:
    buffer, rect = buffers[event.buffer], event.rect
    rows = 0 <= rect.row < rect.row_end <= buffer.rows
    if not (rows and 0 <= rect.place < rect.place_end <= buffer.width and event.use >= 0):
        _fail(f"{process.name} leaves {event.buffer!r} at {event.where}: {rect}")
