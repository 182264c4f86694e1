"""Chat templates: messages to the prompt text that a model was trained on.

A template is a program from the checkpoint, so it runs in jinja2's immutable sandbox, sees plain
data only, and its output is bounded. What templates may expect (filters, functions, whitespace
rules) is that of Hugging Face `apply_chat_template`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer.engine.tokenizer import read_text
from flashformer.errors import CheckpointError, UsageError
from flashformer.model.checkpoint import member

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

FILE = "chat_template.jinja"
_MAX_TEXT = 4 << 20  # characters that a template may write
_MAX_SOURCE_BYTES = 1 << 20
_MAX_DEPTH = 64
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_MARK = "\ue0f0continue\ue0f1 "  # private-use characters; the space shows whether a template trims


class ChatTemplates:
    """The templates of a checkpoint by name, and the special tokens that they may write."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(
        cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> "ChatTemplates":
        """Templates of chat_template.jinja, else of `config`, and of additional_chat_templates/."""
        templates = _from_config(config.get("chat_template"))
        extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        named = {path.stem: str(path.relative_to(folder)) for path in extra}
        if os.path.lexists(folder / FILE):
            named["default"] = FILE
        for name, file in named.items():
            templates[name] = read_text(member(folder, file), _MAX_SOURCE_BYTES)
        return cls(templates, special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        `chat_template` is a template's name or source; the default is "tool_use" when there are
        tools and such a template, else "default". `continue_final_message` leaves the last message
        open, and then no generation prompt is added. `template_kwargs` are further variables of the
        template. Raises `UsageError` for messages that the template refuses, `CheckpointError` for
        a template that is not valid.
        """
        if continue_final_message and add_generation_prompt:
            raise UsageError(
                "add_generation_prompt starts a new message and continue_final_message continues "
                "the last one; switch one of them off."
            )
        chat = _checked_messages(messages)
        variables = _checked_variables(template_kwargs)
        if continue_final_message:
            _mark_end(chat)
        text = _run(
            self._source(chat_template, bool(tools)),
            {
                **self._special_tokens,
                **variables,
                "messages": chat,
                "tools": _plain(list(tools), "tools") if tools is not None else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _source(self, chosen: str | None, has_tools: bool) -> str:
        if chosen is not None:
            return self.templates.get(chosen, chosen)
        name = "tool_use" if has_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            known = ", ".join(sorted(self.templates))
            raise UsageError(
                f"the checkpoint has no default chat template, only {known}; name one of them as "
                "chat_template."
                if known
                else "the checkpoint has no chat template, so it cannot chat; use generate with a "
                "prompt, or give a chat_template."
            )
        return self.templates[name]


def _from_config(value: object) -> dict[str, str]:
    """One template is written as a string, several as a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {
            str(entry["name"]): entry["template"]
            for entry in value
            if isinstance(entry, dict)
            and isinstance(entry.get("template"), str)
            and "name" in entry
        }
    return {}


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain copies of the messages; keys whose value is None are left out, as in HF."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(
            f"a conversation must be a list of messages, not a {type(messages).__name__}."
        )
    if not messages:
        raise UsageError("the conversation is empty; give at least one message.")
    chat = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"message {place} must be a mapping with a role, such as "
                '{"role": "user", "content": "Hi"}.'
            )
        chat.append({k: _plain(v, f"message {place}") for k, v in message.items() if v is not None})
    return chat


def _checked_variables(template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    variables = dict(template_kwargs or {})
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            raise UsageError(
                f"chat_template_kwargs may not set {name!r:.40}; its names are those of the "
                "template's own variables."
            )
    return {
        name: _plain(value, f"chat_template_kwargs.{name}") for name, value in variables.items()
    }


def _plain(value: object, where: str, depth: int = 0) -> Any:  # noqa: ANN401 - JSON of any kind
    """A copy made of JSON's types alone: an object with methods could reach outside the sandbox."""
    if depth > _MAX_DEPTH:
        raise UsageError(f"{where} is nested more than {_MAX_DEPTH} deep.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise UsageError(
        f"{where} holds a {type(value).__name__}; only text, numbers, true, false, null, lists and "
        "mappings can be given to a chat template."
    )


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Append a mark to the last message's text, to find its end in the rendered prompt."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _MARK
        return
    texts = [part for part in content or () if isinstance(part, dict) and "text" in part]
    if not texts:
        raise UsageError("continue_final_message needs a last message with text to continue.")
    texts[-1]["text"] = f"{texts[-1]['text']}{_MARK}"


def _cut_at_mark(text: str) -> str:
    place = text.rfind(_MARK.strip())
    if place < 0:
        raise UsageError(
            "the chat template leaves the last message's text out, so "
            "continue_final_message cannot continue it."
        )
    if text.startswith(_MARK, place):
        return text[:place]
    return text[:place].rstrip()  # the template trims messages, so it would have trimmed this end


def _run(source: str, variables: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    template = _compiled(source)
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables):
            length += len(piece)
            if length > _MAX_TEXT:
                raise UsageError(f"the chat template wrote more than {_MAX_TEXT} characters.")
            pieces.append(piece)
    except TemplateError as error:
        raise UsageError(f"the chat template refused the messages: {_sentence(error)}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"the chat template failed on these messages: {type(error).__name__}: "
            f"{_sentence(error)}"
        ) from None
    except (RecursionError, MemoryError) as error:
        raise UsageError(
            f"the chat template does not end within its limits ({type(error).__name__})."
        ) from None
    return "".join(pieces)


def _sentence(error: Exception) -> str:
    text = str(error)[:500].rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


@lru_cache(maxsize=32)
def _compiled(source: str) -> "Template":
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is not valid jinja2 (line {error.lineno}: {error.message}); "
            "download the checkpoint again, or give a chat_template."
        ) from None
    except RecursionError:
        raise CheckpointError("the chat template is nested too deep to be compiled.") from None


@lru_cache(maxsize=1)
def _environment() -> "ImmutableSandboxedEnvironment":
    """The only place that makes a jinja2 environment."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationBlock(Extension):
        """`{% generation %}` marks a model's own text for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - the type of the base class

        def parse(self, parser: "Parser") -> "list[nodes.Node]":
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """A namespace without underscore names, which lead to Python's internals."""

        def __setitem__(self, name: str, value: object) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Mapping[str, object], **kwargs: object) -> PlainNamespace:
        made = PlainNamespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def mapping(*args: Mapping[str, object], **kwargs: object) -> dict[str, object]:
        return dict(*args, **kwargs)

    def raise_exception(message: str) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:  # the name that templates give it
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals = {
        "range": environment.globals["range"],
        "dict": mapping,
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models read it: jinja2's own filter would escape <, >, & and quotes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
