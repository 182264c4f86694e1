"""The conversation of `/v1/messages`, as messages for a chat template."""

import json
from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.conversation import (
    MAX_MESSAGES,
    MAX_PARTS,
    assistant_call,
)
from flashformer.serve.protocol.fields import MAX_NAME_BYTES, MAX_TEXT_BYTES, items, mapping


def system_text(name: str, value: object) -> str:
    """`system`: a string, or text blocks."""
    return _blocks_text(name, value)


def anthropic_messages(name: str, value: object) -> list[dict[str, Any]]:
    """`messages`: blocks of text, thinking, tool_use and tool_result."""
    messages: list[dict[str, Any]] = []
    for place, entry in enumerate(items(name, value, MAX_MESSAGES)):
        where = f"{name}[{place}]"
        given = mapping(where, entry)
        role = given.get("role")
        if role not in ("user", "assistant", "system"):
            raise ParameterError(
                f"{where}.role", f"must be user or assistant, not {checks.shown(role)}"
            )
        content = given.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif role == "assistant":
            messages.append(_assistant(f"{where}.content", content))
        else:
            messages += _user(role, f"{where}.content", content)
    if not messages:
        raise ParameterError(name, "holds no content")
    return messages


def _assistant(where: str, content: object) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for inner, block in _blocks(where, content):
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(inner, block, "text"))
        elif kind == "thinking":
            thoughts.append(_text(inner, block, "thinking"))
        elif kind == "tool_use":
            arguments = json.dumps(mapping(f"{inner}.input", block.get("input")))
            calls.append(assistant_call(block.get("id"), block.get("name"), arguments, inner))
        elif kind != "redacted_thinking":
            raise _unknown(inner, kind, "text, thinking or tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(role: str, where: str, content: object) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before the text beside them."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for inner, block in _blocks(where, content):
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(inner, block, "text"))
        elif kind == "tool_result":
            identity = checks.text(f"{inner}.tool_use_id", block.get("tool_use_id"), MAX_NAME_BYTES)
            output = block.get("content")
            text = "" if output is None else _blocks_text(f"{inner}.content", output)
            results.append({"role": "tool", "tool_call_id": identity, "content": text})
        else:
            raise _unknown(inner, kind, "text or tool_result")
    if texts or not results:
        results.append({"role": role, "content": "\n".join(texts)})
    return results


def _blocks(where: str, content: object) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(content, list):
        raise ParameterError(
            where, f"must be a string or an array of blocks, not {checks.shown(content)}"
        )
    blocks = items(where, content, MAX_PARTS, 0)
    return [
        (f"{where}[{place}]", mapping(f"{where}[{place}]", block))
        for place, block in enumerate(blocks)
    ]


def _blocks_text(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for inner, block in _blocks(where, content):
        if block.get("type") != "text":
            raise _unknown(inner, block.get("type"), "text")
        texts.append(_text(inner, block, "text"))
    return "\n".join(texts)


def _text(where: str, block: dict[str, Any], key: str) -> str:
    return checks.text(f"{where}.{key}", block.get(key), MAX_TEXT_BYTES)


def _unknown(where: str, kind: object, known: str) -> ParameterError:
    return ParameterError(
        f"{where}.type", f"must be {known}, not {checks.shown(kind)}: the model reads text only"
    )
