"""Conversations as clients send them, made plain for chat templates.

OpenAI's `messages` -> messages with text, parsed tool calls and one spelling of every role.
"""

import json
from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.fields import MAX_NAME_BYTES, MAX_TEXT_BYTES, items, mapping

MAX_MESSAGES = 4096
MAX_PARTS = 4096
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("text", "input_text", "output_text")
# What a client may tell a template about itself; other names would reach into the template's own
# variables.
TEMPLATE_KWARGS = (
    "enable_thinking",
    "thinking",
    "thinking_budget",
    "reasoning_effort",
    "custom_instructions",
    "date_string",
    "tools_in_user_message",
    "builtin_tools",
)


def openai_messages(name: str, value: object) -> list[dict[str, Any]]:
    """`messages` of chat completions."""
    return [
        _message(f"{name}[{place}]", entry)
        for place, entry in enumerate(items(name, value, MAX_MESSAGES))
    ]


def template_kwargs(name: str, value: object) -> dict[str, Any]:
    """`chat_template_kwargs`: names that templates know, with plain values."""
    variables = mapping(name, value)
    for key, entry in variables.items():
        if key not in TEMPLATE_KWARGS:
            known = ", ".join(TEMPLATE_KWARGS)
            raise ParameterError(f"{name}.{key[:40]}", f"is not one of {known}")
        if entry is not None and not isinstance(entry, str | int | float | bool):
            raise ParameterError(
                f"{name}.{key}", f"must be text, a number, true or false, not {checks.shown(entry)}"
            )
    return variables


def text_of(where: str, value: object) -> str:
    """The text of a content: a string, or an array of text parts, which become lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ParameterError(
            where, f"must be a string or an array of text parts, not {checks.shown(value)}"
        )
    texts = []
    for place, part in enumerate(items(where, value, MAX_PARTS, 0)):
        texts.append(_part(f"{where}[{place}]", part))
    return "\n".join(texts)


def call_arguments(text: str) -> object:
    """Arguments as templates expect them: an object; text that is none stays text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def assistant_call(call_id: object, name: object, arguments: object, where: str) -> dict[str, Any]:
    """One call of the conversation's past."""
    identity = (
        {} if call_id is None else {"id": checks.text(f"{where}.id", call_id, MAX_NAME_BYTES)}
    )
    if not isinstance(name, str):
        raise ParameterError(f"{where}.name", f"must be a string, not {checks.shown(name)}")
    if isinstance(arguments, str):
        arguments = call_arguments(arguments)
    elif not isinstance(arguments, dict):
        raise ParameterError(
            f"{where}.arguments", f"must be a string of JSON, not {checks.shown(arguments)}"
        )
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _message(where: str, entry: object) -> dict[str, Any]:
    given = mapping(where, entry)
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ParameterError(
            f"{where}.role", f"must be one of {', '.join(_ROLES)}, not {checks.shown(role)}"
        )
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = given.get("tool_calls")
    content = given.get("content")
    if content is None and not (role == "assistant" and (calls or given.get("refusal"))):
        raise ParameterError(f"{where}.content", "is missing; it must be a string or text parts")
    message["content"] = "" if content is None else text_of(f"{where}.content", content)
    if calls:
        message["tool_calls"] = [
            _call(f"{where}.tool_calls[{place}]", call)
            for place, call in enumerate(items(f"{where}.tool_calls", calls, MAX_PARTS))
        ]
    for name, most in (
        ("name", MAX_NAME_BYTES),
        ("tool_call_id", MAX_NAME_BYTES),
        ("reasoning_content", MAX_TEXT_BYTES),
    ):
        if given.get(name) is not None:
            message[name] = checks.text(f"{where}.{name}", given[name], most)
    return message


def _call(where: str, call: object) -> dict[str, Any]:
    given = mapping(where, call)
    function = mapping(f"{where}.function", given.get("function"))
    return assistant_call(
        given.get("id"), function.get("name"), function.get("arguments", "{}"), f"{where}.function"
    )


def _part(where: str, part: object) -> str:
    given = mapping(where, part)
    kind = given.get("type")
    if kind == "refusal":
        return checks.text(f"{where}.refusal", given.get("refusal"), MAX_TEXT_BYTES)
    if kind not in _TEXTS:
        raise ParameterError(
            f"{where}.type", f"must be text, not {checks.shown(kind)}: the model reads text only"
        )
    return checks.text(f"{where}.text", given.get("text"), MAX_TEXT_BYTES)
