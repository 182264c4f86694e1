"""What a request says about the form of its answer: `response_format` and `structured_outputs`."""

import json
from typing import Any

from flashformer.engine import checks
from flashformer.errors import ParameterError
from flashformer.serve.protocol.fields import items, mapping
from flashformer.serve.server.messages import Grammar

MAX_PATTERN_BYTES = 16 << 10
MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 1024
# White space that JSON may hold between two tokens: enough for a deep indentation, and an end for a
# model that would go on for ever.
_SPACING = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,64}"}
_KINDS = "text, json_object, json_schema or regex"


def response_format(name: str, value: object) -> Grammar | None:
    """`response_format` of chat completions; `regex` has a `pattern`."""
    form = mapping(name, value)
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_object(name)
    if kind == "json_schema":
        where = f"{name}.json_schema"
        inner = mapping(where, form.get("json_schema"))
        return json_schema(f"{where}.schema", inner.get("schema"))
    if kind == "regex":
        return regex(f"{name}.pattern", form.get("pattern"))
    raise ParameterError(f"{name}.type", f"must be {_KINDS}, not {checks.shown(kind)}")


def text_format(name: str, value: object) -> Grammar | None:
    """`text.format` of responses, which has the schema on its own level."""
    form = mapping(name, value)
    if form.get("type") == "json_schema":
        return json_schema(f"{name}.schema", form.get("schema"))
    return response_format(name, value)


def structured_outputs(name: str, value: object) -> Grammar:
    """The field of vLLM: exactly one of json, json_object, regex, choice and grammar (lark)."""
    form = {key: entry for key, entry in mapping(name, value).items() if entry is not None}
    known = [key for key in ("json", "json_object", "regex", "choice", "grammar") if key in form]
    if len(known) != 1:
        raise ParameterError(
            name, "must hold exactly one of json, json_object, regex, choice and grammar"
        )
    kind, where = known[0], f"{name}.{known[0]}"
    entry = form[kind]
    if kind == "json_object":
        if not checks.boolean(where, entry):
            raise ParameterError(where, "must be true; leave it out for any text")
        return json_object(where)
    if kind == "json":
        return json_schema(where, _parsed(where, entry) if isinstance(entry, str) else entry)
    if kind == "regex":
        return regex(where, entry)
    if kind == "choice":
        return choice(where, entry)
    return Grammar("lark", checks.text(where, entry, MAX_GRAMMAR_BYTES), where)


def json_object(field: str) -> Grammar:
    """Any JSON object."""
    return json_schema(field, {"type": "object"})


def json_schema(field: str, schema: object) -> Grammar:
    """JSON that a schema describes; the schema itself is checked when it is compiled."""
    described: dict[str, Any] = {"x-guidance": _SPACING, **mapping(field, schema)}
    source = json.dumps(described)
    if len(source) > MAX_GRAMMAR_BYTES:
        raise ParameterError(field, f"may hold at most {MAX_GRAMMAR_BYTES} bytes")
    return Grammar("json_schema", source, field)


def regex(field: str, pattern: object) -> Grammar:
    """A text that a regular expression matches as a whole."""
    if not checks.text(field, pattern, MAX_PATTERN_BYTES):
        raise ParameterError(field, "must not be empty")
    return Grammar("regex", str(pattern), field)


def choice(field: str, values: object) -> Grammar:
    """One of a few texts."""
    texts = [
        checks.text(field, entry, MAX_PATTERN_BYTES) for entry in items(field, values, MAX_CHOICES)
    ]
    if not all(texts):
        raise ParameterError(field, "must not hold an empty text")
    return Grammar(
        "lark", f"start: {' | '.join(json.dumps(t, ensure_ascii=False) for t in texts)}", field
    )


def _parsed(field: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParameterError(field, f"is not valid JSON: {error}") from None
