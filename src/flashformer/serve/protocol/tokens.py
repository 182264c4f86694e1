"""`/tokenize`, `/detokenize` and `/v1/models`: text, token ids, and what is served."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.asked import read_request, refusing, require_template
from flashformer.serve.protocol.body import read_body
from flashformer.serve.protocol.chat import TEMPLATE_KWARGS_FIELD, conversation_prompt
from flashformer.serve.protocol.common_fields import MODEL
from flashformer.serve.protocol.conversation import openai_messages
from flashformer.serve.protocol.fields import MAX_TEXT_BYTES, Field, boolean, string
from flashformer.serve.protocol.tools import openai_tools, tool_use
from flashformer.serve.server.endpoint import Decode, Prompt, RequestError, TextPrompt
from flashformer.serve.server.messages import ModelInfo

MAX_TOKENS = 1 << 20


def _ids(name: str, value: object) -> tuple[int, ...]:
    return checks.token_ids(name, value, MAX_TOKENS)


TOKENIZE_FIELDS = (
    MODEL,
    Field("prompt", "a string", "the text", string(MAX_TEXT_BYTES), aliases=("content",)),
    Field("messages", "an array of messages", "a conversation instead", openai_messages),
    Field("tools", "an array of functions", "of the conversation", openai_tools),
    TEMPLATE_KWARGS_FIELD,
    Field(
        "add_special_tokens",
        "true or false",
        "the tokenizer's own first tokens, for a text",
        boolean,
        default=True,
        aliases=("add_special",),
    ),
    Field("add_generation_prompt", "true or false", "for a conversation", boolean, default=True),
    Field(
        "return_token_strs",
        "true or false",
        "each token's text as well",
        boolean,
        default=False,
        aliases=("with_pieces",),
    ),
)
DETOKENIZE_FIELDS = (
    MODEL,
    Field("tokens", "an array of token ids", "the tokens", _ids, required=True),
)


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A checked request of `/tokenize`."""

    prompt: Prompt
    with_texts: bool


@refusing()
def parse_tokenize(body: bytes, info: ModelInfo) -> TokenizeRequest:
    """Check a request of `/tokenize`."""
    values = read_request(TOKENIZE_FIELDS, read_body(body), info)
    text, messages = values["prompt"], values["messages"]
    if (text is None) == (messages is None):
        raise ParameterError("prompt", "or messages must be given, and not both")
    with_texts = values["return_token_strs"]
    if text is not None:
        return TokenizeRequest(TextPrompt(text, values["add_special_tokens"]), with_texts)
    require_template(info, "messages")
    prompt = conversation_prompt(
        messages,
        tool_use(values["tools"], None, parallel=True),
        values["chat_template_kwargs"],
        generation_prompt=values["add_generation_prompt"],
    )
    return TokenizeRequest(prompt, with_texts)


def tokenize_body(
    request: TokenizeRequest, token_ids: Sequence[int], info: ModelInfo, decode: Decode
) -> dict[str, Any]:
    """The answer of `/tokenize`."""
    texts = [decode([token_id]) for token_id in token_ids] if request.with_texts else None
    return {
        "count": len(token_ids),
        "max_model_len": info.context,
        "tokens": list(token_ids),
        "token_strs": texts,
    }


@refusing()
def parse_detokenize(body: bytes, info: ModelInfo) -> tuple[int, ...]:
    """The token ids of a request of `/detokenize`."""
    values = read_request(DETOKENIZE_FIELDS, read_body(body), info)
    token_ids: tuple[int, ...] = values["tokens"]
    for place, token_id in enumerate(token_ids):
        if token_id >= info.vocab_size:
            raise RequestError(
                400,
                f"tokens[{place}] is {token_id}, but the model's vocabulary ends at "
                f"{info.vocab_size - 1}.",
                "tokens",
                "invalid_value",
            )
    return token_ids


def model_body(info: ModelInfo) -> dict[str, Any]:
    """The served model, for OpenAI's and Anthropic's clients at once."""
    created = datetime.fromtimestamp(info.created, UTC).isoformat()
    return {
        "id": info.model_id,
        "object": "model",
        "type": "model",
        "created": info.created,
        "created_at": created,
        "owned_by": "flashformer",
        "display_name": info.model_id,
        "max_model_len": info.context,
    }


def models_body(info: ModelInfo) -> dict[str, Any]:
    """The list of models: one."""
    return {
        "object": "list",
        "data": [model_body(info)],
        "has_more": False,
        "first_id": info.model_id,
        "last_id": info.model_id,
    }
