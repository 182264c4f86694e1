"""What the machine does right now, for the page and for people: a few seconds of steps, summed up.

`wire.Step`s -> `LiveStats`
"""

import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from flashformer.serve.server import wire
from flashformer.serve.server.messages import ModelInfo

_WINDOW_SECONDS = 5.0
_TOLD = (
    "model_id",
    "context",
    "max_batch",
    "device",
    "machine",
    "format",
    "image_bytes",
    "kv_bytes",
    "page_tokens",
    "is_embedded",
    "has_chat_template",
)
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
_STAGE_LOOKS = 32  # steps of whose stages the median is taken
_NOTHING = wire.Usage((), 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in the batch."""

    request_id: str
    tokens: int  # stored positions
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class StageLoad:
    """One stage of a token, its layers together."""

    name: str
    nbytes: int  # weights, in attention keys and values, that a step reads
    seconds: float | None  # measured: median of the last decode steps that were looked at


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
    stages: tuple[StageLoad, ...]  # in a token's order; of the last decode steps, however old
    total_tokens: int
    total_requests: int
    engine_restarts: int


def model_card(info: ModelInfo) -> dict[str, Any]:
    """What the page says of the model, and the settings that requests have by default."""
    card = {name: getattr(info, name) for name in _TOLD}
    return {**card, "defaults": {name: info.default_params[name] for name in _DEFAULTS}}


class Recorder:
    """Keeps the last seconds of steps."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        # (moment, seconds, tokens generated, prompt rows, bytes)
        self._steps: deque[tuple[float, float, int, int, int]] = deque()
        self.read_gb_s: float | None = None
        self.usage = _NOTHING
        self._stage_seconds: deque[tuple[float, ...]] = deque(maxlen=_STAGE_LOOKS)
        self._kv_step_bytes = 0
        self.total_tokens = 0
        self.total_requests = 0

    def add(self, step: wire.Step, num_tokens: int) -> None:
        """Note one step."""
        now = time.monotonic()
        num_prompt_rows = max(0, step.num_rows - num_tokens)
        self._steps.append((now, step.seconds, num_tokens, num_prompt_rows, step.nbytes))
        self._forget(now)
        self.total_tokens += num_tokens

    def note_usage(self, usage: wire.Usage) -> None:
        """Note what is taken, and how the last step's time went."""
        self.usage = usage
        if usage.slots:
            self._kv_step_bytes = usage.kv_step_bytes
        if usage.stage_seconds:
            self._stage_seconds.append(usage.stage_seconds)

    def clear(self) -> None:
        """The engine is gone."""
        self.usage = _NOTHING
        self._stage_seconds.clear()

    def sum_up(
        self, *, state: str, slots: tuple[Slot, ...], info: ModelInfo | None, restarts: int
    ) -> LiveStats:
        """The picture of this moment."""
        now = time.monotonic()
        self._forget(now)
        steps = list(self._steps)
        seconds = [step[1] for step in steps]
        span = min(_WINDOW_SECONDS, now - self._began)
        typical = median(seconds) if seconds else None
        nbytes = steps[-1][4] if steps else None
        rate = nbytes / typical / 1e9 if nbytes and typical else None
        return LiveStats(
            state=state,
            uptime=now - self._began,
            num_running=len(self.usage.slots),
            num_waiting=self.usage.num_waiting,
            max_batch=0 if info is None else info.max_batch,
            slots=slots,
            pages_used=self.usage.pages_used,
            pages_cached=self.usage.pages_cached,
            num_pages=0 if info is None else info.num_pages,
            tokens_per_second=sum(step[2] for step in steps) / span if span else 0.0,
            prompt_tokens_per_second=sum(step[3] for step in steps) / span if span else 0.0,
            step_seconds=typical,
            step_bytes=nbytes,
            gb_per_second=rate,
            read_gb_s=self.read_gb_s,
            share=rate / self.read_gb_s if rate and self.read_gb_s else None,
            recent_step_seconds=tuple(step[1] for step in steps[-64:]),
            stages=() if info is None else self._stages(info),
            total_tokens=self.total_tokens,
            total_requests=self.total_requests,
            engine_restarts=restarts,
        )

    def _stages(self, info: ModelInfo) -> tuple[StageLoad, ...]:
        medians = [median(times) for times in zip(*self._stage_seconds, strict=True)]
        return tuple(
            StageLoad(
                name,
                self._kv_step_bytes if name == "attention" else nbytes,
                medians[place] if medians else None,
            )
            for place, (name, nbytes) in enumerate(info.stages)
        )

    def _forget(self, now: float) -> None:
        while self._steps and now - self._steps[0][0] > _WINDOW_SECONDS:
            self._steps.popleft()
