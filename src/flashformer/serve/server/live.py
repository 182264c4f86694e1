"""What the machine does right now, for the page and for people: a few seconds of steps, summed up.

`wire.Step`s -> `LiveStats`
"""

import time
from collections import deque
from dataclasses import dataclass

from flashformer.serve.server import wire

_WINDOW_SECONDS = 5.0
_NOTHING = wire.Usage((), 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in the batch."""

    request_id: str
    tokens: int  # stored positions
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class LiveStats:
    """Means are over the last five seconds; None where nothing ran in them."""

    state: str  # loading | ready | restarting | down | draining
    uptime: float  # seconds
    num_running: int  # sequences with a slot
    num_waiting: int  # sequences without one
    max_batch: int
    slots: tuple[Slot, ...]
    pages_used: int
    pages_cached: int  # free, but their content can still be found
    num_pages: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    step_seconds: float | None  # median
    step_bytes: int | None  # that the last step had to read
    gb_per_second: float | None  # step_bytes / step_seconds
    read_gb_s: float | None  # the machine's read bandwidth, measured on the model's own image
    share: float | None  # gb_per_second / read_gb_s
    recent_step_seconds: tuple[float, ...]  # the last steps, oldest first
    total_tokens: int
    total_requests: int
    engine_restarts: int


class Recorder:
    """Keeps the last seconds of steps."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        # (moment, seconds, tokens generated, prompt rows, bytes)
        self._steps: deque[tuple[float, float, int, int, int]] = deque()
        self.read_gb_s: float | None = None
        self.usage = _NOTHING
        self.total_tokens = 0
        self.total_requests = 0

    def add(self, step: wire.Step, num_tokens: int) -> None:
        """Note one step."""
        now = time.monotonic()
        num_prompt_rows = max(0, step.num_rows - num_tokens)
        self._steps.append((now, step.seconds, num_tokens, num_prompt_rows, step.nbytes))
        self._forget(now)
        self.total_tokens += num_tokens

    def clear(self) -> None:
        """The engine is gone."""
        self.usage = _NOTHING

    def sum_up(
        self, *, state: str, slots: tuple[Slot, ...], max_batch: int, num_pages: int, restarts: int
    ) -> LiveStats:
        """The picture of this moment."""
        now = time.monotonic()
        self._forget(now)
        steps = list(self._steps)
        seconds = sorted(step[1] for step in steps)
        span = min(_WINDOW_SECONDS, now - self._began)
        median = seconds[len(seconds) // 2] if seconds else None
        nbytes = steps[-1][4] if steps else None
        rate = nbytes / median / 1e9 if nbytes and median else None
        return LiveStats(
            state=state,
            uptime=now - self._began,
            num_running=len(self.usage.slots),
            num_waiting=self.usage.num_waiting,
            max_batch=max_batch,
            slots=slots,
            pages_used=self.usage.pages_used,
            pages_cached=self.usage.pages_cached,
            num_pages=num_pages,
            tokens_per_second=sum(step[2] for step in steps) / span if span else 0.0,
            prompt_tokens_per_second=sum(step[3] for step in steps) / span if span else 0.0,
            step_seconds=median,
            step_bytes=nbytes,
            gb_per_second=rate,
            read_gb_s=self.read_gb_s,
            share=rate / self.read_gb_s if rate and self.read_gb_s else None,
            recent_step_seconds=tuple(step[1] for step in steps[-64:]),
            total_tokens=self.total_tokens,
            total_requests=self.total_requests,
            engine_restarts=restarts,
        )

    def _forget(self, now: float) -> None:
        while self._steps and now - self._steps[0][0] > _WINDOW_SECONDS:
            self._steps.popleft()
