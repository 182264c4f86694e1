"""The input of `/v1/responses`, as messages for a chat template."""

from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.conversation import (
    MAX_MESSAGES,
    assistant_call,
    openai_messages,
    text_of,
)
from flashformer.serve.protocol.fields import MAX_NAME_BYTES, MAX_TEXT_BYTES, items, mapping


def read_input(name: str, value: object) -> list[dict[str, Any]]:
    """A text, or items: messages, function calls, their outputs, reasoning."""
    if isinstance(value, str):
        return [{"role": "user", "content": checks.text(name, value, MAX_TEXT_BYTES)}]
    messages: list[dict[str, Any]] = []
    reasoning: str | None = None
    for place, entry in enumerate(items(name, value, MAX_MESSAGES)):
        where = f"{name}[{place}]"
        item = mapping(where, entry)
        kind = item.get("type", "message")
        if kind == "reasoning":
            reasoning = _reasoning(where, item)
        elif kind == "function_call":
            call = assistant_call(
                item.get("call_id"), item.get("name"), item.get("arguments"), where
            )
            _add_call(messages, call, reasoning)
            reasoning = None
        elif kind == "function_call_output":
            messages.append(_output(where, item))
        elif kind == "message":
            (message,) = openai_messages(name, [item])
            if message["role"] == "assistant" and reasoning is not None:
                message["reasoning_content"], reasoning = reasoning, None
            messages.append(message)
        else:
            raise ParameterError(
                f"{where}.type",
                "must be message, function_call, function_call_output or reasoning, not "
                f"{checks.shown(kind)}",
            )
    if not messages:
        raise ParameterError(name, "holds no message")
    return messages


def _add_call(messages: list[dict[str, Any]], call: dict[str, Any], reasoning: str | None) -> None:
    """Calls that follow each other are one message of the assistant."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
        if reasoning is not None:
            messages[-1]["reasoning_content"] = reasoning
    messages[-1].setdefault("tool_calls", []).append(call)


def _output(where: str, item: dict[str, Any]) -> dict[str, Any]:
    call_id = checks.text(f"{where}.call_id", item.get("call_id"), MAX_NAME_BYTES)
    content = text_of(f"{where}.output", item.get("output"))
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _reasoning(where: str, item: dict[str, Any]) -> str:
    texts = []
    for place, part in enumerate(items(f"{where}.content", item.get("content") or [], 4096, 0)):
        inner = f"{where}.content[{place}]"
        texts.append(checks.text(inner, mapping(inner, part).get("text"), MAX_TEXT_BYTES))
    return "\n".join(texts)
