"""A checked request of any API that generates, as the server runs it; what those APIs share."""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashformer.engine.sampling import SamplingParams
from flashformer.errors import ParameterError
from flashformer.serve.protocol.fields import Field, Values, read, require_model
from flashformer.serve.protocol.rules import AnswerRules
from flashformer.serve.server.endpoint import Decode, Prompt, RequestError, Responder
from flashformer.serve.server.messages import Grammar, ModelInfo

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # made once: for each token

Make = Callable[[Sequence[Sequence[int]], Decode], Responder]


@dataclass(frozen=True, slots=True)
class Asked:
    """A `ParsedRequest`."""

    stream: bool
    prompts: Sequence[Prompt]
    params: SamplingParams
    rules: AnswerRules
    make: Make

    def grammar(self, prompts: Sequence[Sequence[int]], decode: Decode) -> Grammar | None:
        """The same for all prompts: an API with several prompts has no conversations."""
        return self.rules.grammar(prompts[0], decode)

    def responder(self, prompts: Sequence[Sequence[int]], decode: Decode) -> Responder:
        """Who answers."""
        return self.make(prompts, decode)


def read_request(fields: Sequence[Field], body: Mapping[str, Any], info: ModelInfo) -> Values:
    """A body against a route's table, for the model that is served."""
    values = read(fields, body)
    require_model(values, info)
    return values


@contextmanager
def refusing() -> Iterator[None]:
    """Around a function of a body: a parameter's error becomes the answer to a client."""
    try:
        yield
    except ParameterError as error:
        raise RequestError(400, f"{error}.", error.parameter, "invalid_value") from None


def require_template(info: ModelInfo, field: str) -> None:
    """Refuse conversations where no template says how to write them."""
    if not info.has_chat_template:
        raise RequestError(
            400,
            "the model has no chat template, so it cannot chat; use /v1/completions with a prompt.",
            field,
            "no_chat_template",
        )


def new_id(prefix: str) -> str:
    """An identifier that no other answer has."""
    return f"{prefix}{uuid.uuid4().hex}"


def call_id(prefix: str = "call_") -> str:
    """A tool call's identifier; Mistral's templates want exactly nine characters."""
    return f"{prefix}{uuid.uuid4().hex[:24]}" if prefix else uuid.uuid4().hex[:9]


def dumps(value: object) -> str:
    """JSON in one line."""
    return _ENCODER.encode(value)


def event(value: object, name: str | None = None) -> str:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {dumps(value)}\n\n"


def openai_error(error: RequestError) -> dict[str, Any]:
    """The body of OpenAI's errors."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }
