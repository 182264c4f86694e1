"""How a route and the protocol modules fit together; the protocol modules do no input or output.

body -> `Endpoint` -> `ParsedRequest` -> prompts as token ids -> events -> `Responder` -> text
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flashformer.engine.sampling import SamplingParams
from flashformer.serve.server.messages import GenerateEvent, Grammar, ModelInfo


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, to be put into the checkpoint's chat template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text, to be tokenised."""

    text: str
    add_special_tokens: bool = True


Decode = Callable[[Sequence[int]], str]  # token ids -> text, with special tokens

Prompt = ChatPrompt | TextPrompt | tuple[int, ...]  # a tuple holds token ids


class RequestError(Exception):
    """What a client got wrong; the route turns it into the body that its API has for errors."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message  # one sentence
        self.param = param
        self.code = code


class Responder(Protocol):
    """Turns the events of one request into what its client hears.

    Texts of a stream are complete server-sent events: a line `data: {...}` and an empty line, with
    a line `event: name` before them where the API names its events.
    """

    def begin(self) -> list[str]:
        """What a stream starts with, sent when the first events are there."""
        ...

    def add(self, event: GenerateEvent) -> list[str]:
        """Take an event, in order; what a stream says about it (ignored without a stream)."""
        ...

    def end(self) -> list[str]:
        """What a stream ends with, after the last event of every sequence."""
        ...

    def fail(self, error: RequestError) -> list[str]:
        """What a stream ends with when the server must break it off."""
        ...

    def body(self) -> Mapping[str, Any]:
        """The JSON body without a stream, after the last event of every sequence."""
        ...


class ParsedRequest(Protocol):
    """A checked request of any endpoint."""

    @property
    def stream(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        ...

    @property
    def prompts(self) -> Sequence[Prompt]:
        """What to continue; every prompt becomes one engine request of `params.n` sequences."""
        ...

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen, with the model's defaults where the client named nothing."""
        ...

    def grammar(self, prompts: Sequence[Sequence[int]], decode: Decode) -> Grammar | None:
        """What the text must look like behind these prompts: they may have begun to reason."""
        ...

    def responder(self, prompts: Sequence[Sequence[int]], decode: Decode) -> Responder:
        """Who answers, now that the prompts' token ids are known (for usage and echo)."""
        ...


# Checks a body, for the model that is served; raises `RequestError` with the field that is wrong.
Endpoint = Callable[[bytes, ModelInfo], ParsedRequest]
