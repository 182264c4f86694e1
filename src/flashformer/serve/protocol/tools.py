"""Tools of a request: what the model may call, and whether it must.

`tools` and `tool_choice` of any API -> `ToolUse`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.fields import items, mapping

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the client offers."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]  # a JSON schema of an object
    where: str  # the field of the request, for errors

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools."""

    tools: Sequence[Tool] = ()
    mode: str = "none"  # none | auto | required
    allowed: Sequence[Tool] = field(default=())  # those that a required call may name
    parallel: bool = True

    @property
    def active(self) -> bool:
        """Whether the answer may hold calls."""
        return self.mode != "none" and bool(self.tools)


def read_tool(where: str, function: object, schema_key: str) -> Tool:
    """One function: its name, description and schema."""
    value = mapping(where, function)
    name = value.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ParameterError(
            f"{where}.name",
            f"must be 1 to 64 letters, digits and _.:-, not {checks.shown(name)}",
        )
    description = value.get("description")
    if description is not None:
        checks.text(f"{where}.description", description, 1 << 20)
    schema = value.get(schema_key)
    schema = _NO_PARAMETERS if schema is None else mapping(f"{where}.{schema_key}", schema)
    return Tool(name, description, schema, f"{where}.{schema_key}")


def openai_tools(name: str, value: object) -> list[Tool]:
    """`tools` of chat completions: {"type": "function", "function": {...}}."""
    tools = []
    for place, entry in enumerate(items(name, value, MAX_TOOLS, 0)):
        where = f"{name}[{place}]"
        _require_function(where, mapping(where, entry))
        tools.append(read_tool(f"{where}.function", entry.get("function"), "parameters"))
    return _distinct(name, tools)


def responses_tools(name: str, value: object) -> list[Tool]:
    """`tools` of responses: {"type": "function", "name": ...}, without a level between."""
    tools = []
    for place, entry in enumerate(items(name, value, MAX_TOOLS, 0)):
        where = f"{name}[{place}]"
        _require_function(where, mapping(where, entry))
        tools.append(read_tool(where, entry, "parameters"))
    return _distinct(name, tools)


def anthropic_tools(name: str, value: object) -> list[Tool]:
    """`tools` of messages: {"name": ..., "input_schema": {...}}; only the client's own tools."""
    tools = []
    for place, entry in enumerate(items(name, value, MAX_TOOLS, 0)):
        where = f"{name}[{place}]"
        kind = mapping(where, entry).get("type")
        if kind not in (None, "custom"):
            raise ParameterError(
                f"{where}.type", f"must be custom, not {checks.shown(kind)}: no tool runs here"
            )
        tools.append(read_tool(where, entry, "input_schema"))
    return _distinct(name, tools)


def openai_choice(name: str, value: object) -> tuple[str, str | None]:
    """`tool_choice` of chat completions and responses: (mode, the function that must be called)."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value, None
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function", value)
        called = function.get("name") if isinstance(function, dict) else None
        if isinstance(called, str):
            return "required", called
    raise ParameterError(
        name,
        'must be none, auto, required or {"type": "function", "function": {"name": ...}}, not '
        f"{checks.shown(value)}",
    )


def anthropic_choice(name: str, value: object) -> tuple[str, str | None, bool]:
    """`tool_choice` of messages: (mode, the function that must be called, parallel)."""
    choice = mapping(name, value)
    kind, called = choice.get("type"), choice.get("name")
    single = choice.get("disable_parallel_tool_use")
    parallel = not (
        single is not None and checks.boolean(f"{name}.disable_parallel_tool_use", single)
    )
    modes = {"none": "none", "auto": "auto", "any": "required"}
    if isinstance(kind, str) and kind in modes:
        return modes[kind], None, parallel
    if kind == "tool" and isinstance(called, str):
        return "required", called, parallel
    raise ParameterError(
        name, f"must have a type of none, auto, any or tool with a name, not {checks.shown(kind)}"
    )


def tool_use(
    tools: Sequence[Tool] | None, choice: tuple[str, str | None] | None, *, parallel: bool
) -> ToolUse:
    """Tools and choice together; a choice must be one of the tools."""
    if not tools:
        if choice is not None and choice[0] == "required":
            raise ParameterError("tool_choice", "asks for a call, but tools offers no function")
        return ToolUse()
    mode, called = choice or ("auto", None)
    allowed = [tool for tool in tools if called in (None, tool.name)]
    if not allowed:
        raise ParameterError("tool_choice", f"names {checks.shown(called)}, which is not in tools")
    return ToolUse(tools, mode, allowed, parallel)


def _require_function(where: str, entry: Mapping[str, Any]) -> None:
    if entry.get("type") != "function":
        raise ParameterError(
            f"{where}.type",
            f"must be function, not {checks.shown(entry.get('type'))}: no other tool runs here",
        )


def _distinct(name: str, tools: list[Tool]) -> list[Tool]:
    names = [tool.name for tool in tools]
    for tool in tools:
        if names.count(tool.name) > 1:
            raise ParameterError(name, f"holds two functions of the name {tool.name}")
    return tools
