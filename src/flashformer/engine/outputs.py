"""What the Python API returns; the names of the fields are vLLM's.

`Delta`s of a request -> `RequestOutput`, or one `StreamChunk` each.
"""

from dataclasses import dataclass, field

from flashformer.engine.sequence import Delta, Logprobs, Request


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # with the token that ended it
    cumulative_logprob: float | None = None  # None unless logprobs were asked for
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Append one step's news."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        for token_id, entries in zip(delta.token_ids, delta.logprobs, strict=False):
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.append(entries)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + entries[token_id].logprob
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request read and wrote."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the KV cache

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """How long a request took, in seconds and tokens a second; 0.0: nothing to measure."""

    queue_time: float  # until the first sequence got its slot
    ttft: float  # time to first token, from the request's arrival
    prompt_tok_s: float  # computed prompt tokens over the time from the slot to the first token
    decode_tok_s: float  # tokens after the first of each sequence, over the time they took together
    total_time: float
    cached_tokens: int


@dataclass(slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt: str | None  # None if token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None  # the first entry is None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None  # why an output's finish_reason is "error"


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One step's news of one continuation; `usage` and `metrics` come with the request's last."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


def request_output(
    request: Request, prompt: str | None, outputs: list[CompletionOutput]
) -> RequestOutput:
    """The whole result of a request."""
    wants_prompt = request.params.prompt_logprobs is not None
    return RequestOutput(
        request_id=str(request.number),
        prompt=prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=outputs,
        finished=request.finished,
        prompt_logprobs=list(request.prompt_logprobs) if wants_prompt else None,
        metrics=request_metrics(request),
        num_cached_tokens=request.cached_tokens,
        error=request.error,
    )


def stream_chunk(delta: Delta, last: bool) -> StreamChunk:
    """One delta as the caller sees it; `last` of its request."""
    request = delta.request
    return StreamChunk(
        request_id=str(request.number),
        index=delta.index,
        text=delta.text,
        token_ids=list(delta.token_ids),
        logprobs=list(delta.logprobs) if request.params.logprobs is not None else None,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        usage=request_usage(request) if last else None,
        metrics=request_metrics(request) if last else None,
        error=request.error if delta.finish_reason == "error" else None,
    )


def request_usage(request: Request) -> Usage:
    """Tokens so far."""
    return Usage(
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=sum(sequence.num_generated for sequence in request.sequences),
        cached_tokens=request.cached_tokens,
    )


def request_metrics(request: Request) -> RequestMetrics:
    """Times so far."""
    times = [sequence.times for sequence in request.sequences if sequence.times.first_token]
    if not times:
        return RequestMetrics(0.0, 0.0, 0.0, 0.0, 0.0, request.cached_tokens)
    arrived = request.sequences[0].times.arrived
    first = min(times, key=lambda t: t.first_token)
    later = sum(
        sequence.num_generated - 1 for sequence in request.sequences if sequence.num_generated
    )
    read = len(request.prompt_token_ids) - request.cached_tokens
    last = max(t.last_token for t in times)
    return RequestMetrics(
        queue_time=first.started - arrived,
        ttft=first.first_token - arrived,
        prompt_tok_s=_rate(read, first.first_token - first.started),
        decode_tok_s=_rate(later, last - first.first_token),
        total_time=last - arrived,
        cached_tokens=request.cached_tokens,
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
