"""How fast an answer came, against what the machine's memory allows.

`Answer` + `LLM` -> `Speed`, as JSON or as the line at the end of a run.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flashformer.backends.base import Backend
from flashformer.engine.llm import LLM
from flashformer.serve.answer import Answer

READ_SECONDS = 0.2
BEYOND_CACHES_BYTES = 256 * 2**20  # a smaller image may stay in the processor's cache


@runtime_checkable
class ReadsMemory(Protocol):
    """A backend that can measure the memory which its weights stream from."""

    def read_bandwidth(self, seconds: float = ..., *, own_image: bool = ...) -> float:
        """10^9 bytes a second of plain reads by the backend's own threads."""
        ...


@dataclass(frozen=True, slots=True)
class Speed:
    """Times and rates of one answer; None where there was too little to measure."""

    load_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    first_token_s: float
    prompt_tok_s: float | None
    decode_tok_s: float | None
    ms_per_token: float | None
    bytes_per_token: int  # from the plan, at the answer's mean context
    gb_s: float | None
    read_gb_s: float | None  # measured right after the answer, on the packed weights
    share: float | None  # gb_s / read_gb_s

    def to_json(self) -> dict[str, Any]:
        """The object under `timing`."""
        return {name: getattr(self, name) for name in self.__slots__}

    def line(self) -> str:
        """One line for people."""
        prompt = f"prompt {self.prompt_tokens} tok"
        if self.prompt_tok_s:
            prompt += f" {self.prompt_tok_s:.0f} tok/s"
        if self.cached_tokens:
            prompt += f" ({self.cached_tokens} cached)"
        decode = f"{self.completion_tokens} tok"
        if self.decode_tok_s and self.ms_per_token and self.gb_s:
            digits = 1 if self.ms_per_token >= 10 else 2
            decode += f" {self.decode_tok_s:.1f} tok/s ({self.ms_per_token:.{digits}f} ms/tok"
            decode += f", {self.gb_s:.1f} GB/s"
            if self.share and self.read_gb_s:
                decode += f", {100 * self.share:.0f} % of {self.read_gb_s:.1f} GB/s measured now"
            decode += ")"
        return f"{prompt} · {decode} · first token {self.first_token_s * 1e3:.0f} ms"


def measure_speed(answer: Answer, llm: LLM, load_s: float) -> Speed | None:
    """The speed of a finished answer; None for one that was stopped before it had any."""
    usage, metrics = answer.usage, answer.metrics
    if usage is None or metrics is None:
        return None
    mean_context = usage.prompt_tokens + (usage.completion_tokens + 1) // 2
    bytes_per_token = llm.plan.bytes_per_step(mean_context)
    rate = metrics.decode_tok_s or None
    gb_s = bytes_per_token * rate / 1e9 if rate else None
    read_gb_s = read_bandwidth(llm.backend)
    return Speed(
        load_s=load_s,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        first_token_s=metrics.ttft,
        prompt_tok_s=metrics.prompt_tok_s or None,
        decode_tok_s=rate,
        ms_per_token=1e3 / rate if rate else None,
        bytes_per_token=bytes_per_token,
        gb_s=gb_s,
        read_gb_s=read_gb_s,
        share=gb_s / read_gb_s if gb_s and read_gb_s else None,
    )


def read_bandwidth(backend: Backend) -> float | None:
    """GB/s of plain reads of the model's own image; None if it may fit into a cache."""
    if backend.plan.image_bytes < BEYOND_CACHES_BYTES or not isinstance(backend, ReadsMemory):
        return None
    return backend.read_bandwidth(READ_SECONDS, own_image=True)
