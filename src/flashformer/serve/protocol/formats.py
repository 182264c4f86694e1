"""How a model writes reasoning and tool calls, as its chat template shows, and how to force a call.

chat template's source -> `AnswerFormat`; tools -> the grammar of an answer that calls them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from flashformer.serve.protocol.reasoning import CLOSE, OPEN
from flashformer.serve.protocol.tool_parsers import (
    HERMES_CLOSE,
    HERMES_OPEN,
    LLAMA_OPEN,
    MISTRAL_OPEN,
    HermesParser,
    LlamaParser,
    MistralParser,
    ToolParser,
)
from flashformer.serve.protocol.tools import Tool
from flashformer.serve.server.messages import Grammar

MAX_FORCED_CALLS = 16
# One spelling of JSON, so that no model can loop in white space between the brackets.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What to look for in a model's answers."""

    tools: str | None = None  # hermes | llama | mistral; None: the template shows no tools
    reasons: bool = False

    @property
    def hides_calls(self) -> bool:
        """Whether the marks of a call are special tokens, which texts leave out."""
        return self.tools in ("llama", "mistral")

    def tool_parser(self, tools: Sequence[Tool], *, forced: bool) -> ToolParser:
        """A parser for one answer; a forced answer is what `forced_calls` describes."""
        if self.tools == "hermes":
            return HermesParser()
        if self.tools == "mistral":
            return MistralParser(inside=forced)
        return LlamaParser(tool.name for tool in tools)


@lru_cache(maxsize=16)
def answer_format(template: str) -> AnswerFormat:
    """The format that a chat template's source speaks of."""
    tools = None
    if "tools" in template:
        if HERMES_OPEN in template and "<function=" not in template:
            tools = "hermes"
        elif MISTRAL_OPEN in template:
            tools = "mistral"
        elif LLAMA_OPEN in template or '"parameters":' in template:
            tools = "llama"
    return AnswerFormat(tools, CLOSE in template or OPEN in template)


def forced_calls(form: AnswerFormat, tools: Sequence[Tool], *, parallel: bool) -> str:
    """Lark rules of which `calls` is one call of one of `tools`, or several if `parallel`."""
    key = "parameters" if form.tools not in ("hermes", "mistral") else "arguments"
    lines = [f"call: {' | '.join(f'call_{place}' for place in range(len(tools)))}"]
    for place, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{key}": ')
        schema = json.dumps({**tool.parameters, "x-guidance": _COMPACT})
        lines.append(f'call_{place}: {head} %json {schema} "}}"')
    opened, closed, between = "", "", "; "
    if form.tools == "hermes":
        opened, closed, between = (
            f"{HERMES_OPEN}\n",
            f"\n{HERMES_CLOSE}",
            f"\n{HERMES_CLOSE}\n{HERMES_OPEN}\n",
        )
    elif form.tools == "mistral":
        opened, closed, between = "[", "]", ", "
    more = f" ({json.dumps(between)} call){{0,{MAX_FORCED_CALLS - 1}}}" if parallel else ""
    return "\n".join([f"calls: {json.dumps(opened)} call{more} {json.dumps(closed)}", *lines])


def answer_rule(grammar: Grammar) -> str:
    """A grammar as the lark rule `answer`."""
    if grammar.kind == "json_object":
        return 'answer: %json {"type": "object"}'
    if grammar.kind == "json_schema":
        return f"answer: %json {grammar.source}"
    if grammar.kind == "regex":
        from llguidance import regex_to_lark

        return f"answer: /{regex_to_lark(grammar.source, '')}/"
    return f"answer: %lark {{\n{grammar.source}\n}}"


def reasoning_rule() -> str:
    """The lark rule `think`: free text up to the end of the block, and white space."""
    return (
        f"think: thought SPACE\nthought[suffix={json.dumps(CLOSE)}]: /(?s:.*)/\n"
        "SPACE: /[ \\t\\r\\n]{0,8}/"
    )
