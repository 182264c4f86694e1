"""What the HTTP side and the engine process say to each other; plain data, no behaviour.

A route makes a `GenerateRequest`; `EngineClient.generate` yields its `GenerateEvent`s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashformer.engine.sampling import SamplingParams
from flashformer.engine.sequence import Logprobs
from flashformer.errors import FlashFormerError, UsageError

GRAMMAR_KINDS = ("json_object", "json_schema", "regex", "lark")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text must look like, as the request wrote it; compiled where it is used."""

    kind: str  # one of GRAMMAR_KINDS
    source: str = ""  # the schema as JSON text, the regular expression, or the lark grammar
    field: str = "response_format"  # of the request that asked for it, for errors


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Prompts to continue: every prompt becomes one engine request of `params.n` sequences."""

    request_id: str  # the X-Request-Id, for logs
    prompts: tuple[tuple[int, ...], ...]  # token ids
    params: SamplingParams
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """What one step added to one sequence; the one with a `finish_reason` is its last.

    The iterator ends after the last event of every sequence of every prompt.
    """

    prompt_index: int
    sequence_index: int  # 0 <= index < params.n
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()  # one a token, if params.logprobs is set
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    cached_tokens: int = 0  # of the prompt; the same in every event of a prompt
    # With the first event of sequence 0 if params.prompt_logprobs is set; the first entry is None.
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    error: str | None = None  # one sentence, with finish_reason "error"
    client_fault: bool = False  # the request itself made the error unavoidable


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loaded model is; the same from the first request to the last."""

    model_id: str  # the name that requests use
    created: int  # seconds since 1970, when it was loaded
    context: int  # tokens of one sequence, prompt included
    vocab_size: int
    max_batch: int
    device: str  # cpu | cuda | reference
    machine: str
    format: str  # of the weights
    image_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    num_pages: int
    page_tokens: int
    fingerprint: str  # of version, model, plan: changes when answers may change
    stages: tuple[tuple[str, int], ...] = ()  # name and bytes of weights, in a token's order
    # Requests that leave a field out get the value of these (names of `SamplingParams`).
    default_params: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    is_embedded: bool = False  # the default model of the package
    has_tokenizer: bool = True
    has_chat_template: bool = False
    chat_template: str = ""  # its source, which shows how the model writes calls and reasoning


class ServerError(FlashFormerError):
    """A request that the server cannot take now, through no fault of its own."""

    def __init__(
        self, sentence: str, *, status: int = 503, code: str, retry_after: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status  # of HTTP
        self.code = code
        self.retry_after = retry_after  # seconds


class RejectedError(UsageError):
    """A request that can never run; `parameter` is what is wrong with it, where that is known."""

    def __init__(
        self, sentence: str, parameter: str | None = None, code: str = "invalid_value"
    ) -> None:
        super().__init__(sentence)
        self.parameter = parameter
        self.code = code
