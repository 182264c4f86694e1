"""One answer of the engine: streamed to the user, then summed up.

`StreamChunk`s -> `Answer`
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from flashformer.engine.outputs import RequestMetrics, StreamChunk, Usage
from flashformer.engine.sampling import SamplingParams
from flashformer.errors import FlashFormerError


@dataclass(frozen=True, slots=True)
class Answer:
    """What `run` and `chat` report."""

    text: str
    token_ids: list[int]
    finish_reason: str  # stop | length | abort
    usage: Usage | None  # None if the answer was stopped before its end
    metrics: RequestMetrics | None

    def to_json(self, timing: dict[str, Any] | None) -> dict[str, Any]:
        """The answer as `--json` prints it."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": _usage_json(self.usage),
            "timing": timing,
        }


def sampling_params(defaults: SamplingParams | None, given: dict[str, Any]) -> SamplingParams:
    """The model's own defaults (None: those of the class) with the flags that were given."""
    named = {name: value for name, value in given.items() if value is not None}
    if defaults is None:
        return SamplingParams(**named)
    fields = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(defaults)}
    return SamplingParams(**{**fields, **named})


def write_text(text: str) -> None:
    """Show text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Interrupt:
    """Inside this context Ctrl-C asks for the end of an answer; a second one forces it.

    The answer then ends between two steps, and the model stays usable.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def collect(
    chunks: Iterator[StreamChunk],
    show: Callable[[str], None] | None = None,
    interrupt: Interrupt | None = None,
) -> Answer:
    """Read a stream to its end, showing each delta; Ctrl-C ends it with finish_reason "abort".

    Raises `FlashFormerError` when the engine ended the answer with an error.
    """
    text: list[str] = []
    token_ids: list[int] = []
    last: StreamChunk | None = None
    try:
        for chunk in chunks:
            last = chunk
            text.append(chunk.text)
            token_ids.extend(chunk.token_ids)
            if chunk.text and show is not None:
                show(chunk.text)
            if interrupt is not None and interrupt.asked:
                break
    except KeyboardInterrupt:
        return Answer("".join(text), token_ids, "abort", None, None)
    if last is None or last.finish_reason == "error":
        raise FlashFormerError(f"{last.error if last else 'the engine gave no answer'}")
    reason = last.finish_reason or "abort"
    return Answer("".join(text), token_ids, reason, last.usage, last.metrics)


def _usage_json(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    return {name: getattr(usage, name) for name in names}
