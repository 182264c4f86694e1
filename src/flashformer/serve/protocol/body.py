"""Request bodies: bytes to JSON values that every later check may trust.

body -> dict; `RequestError` names the field that holds what JSON or Unicode does not allow.
"""

import json
import math
from typing import Any

from flashformer.serve.server.endpoint import RequestError

MAX_DEPTH = 64
_LONGEST_INTEGER = 64  # digits; no field takes more, and Python's own parser stops at 4300
# A search is cheaper than a call for each number, and this one than a regular expression.
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_INTEGER = b"0" * (_LONGEST_INTEGER + 1)


def read_body(body: bytes) -> dict[str, Any]:
    """The object in `body`: finite numbers and valid Unicode only, at most MAX_DEPTH deep."""
    try:
        parse_int = _integer if _LONG_INTEGER in body.translate(_DIGITS_TO_ZERO) else None
        value = json.loads(body.decode("utf-8"), parse_int=parse_int)
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not valid UTF-8: see byte {error.start}.") from None
    except RecursionError:
        raise _refusal(f"the body is nested more than {MAX_DEPTH} deep.") from None
    except ValueError as error:
        raise _refusal(f"the body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise _refusal(f"the body must be a JSON object, not {_kind(value)}.")
    for name, entry in value.items():
        if not _is_text(name):
            raise _refusal("the body holds a name that is not valid Unicode.")
        _check(name, name, entry, 1)
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


def _check(field: str, path: str, value: object, depth: int) -> None:
    """Refuse what JSON's grammar lets through and the fields do not."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _refusal(f"{path} must be a finite number of reasonable length.", field)
    if isinstance(value, str) and not _is_text(value):
        raise _refusal(f"{path} is not valid Unicode: it holds half of a surrogate pair.", field)
    if isinstance(value, list | dict) and depth >= MAX_DEPTH:
        raise _refusal(f"{path[:200]} is nested more than {MAX_DEPTH} deep.", field)
    if isinstance(value, list):
        for place, item in enumerate(value):
            if type(item) is not int:
                _check(field, f"{path}[{place}]", item, depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not _is_text(name):
                raise _refusal(f"{path} holds a name that is not valid Unicode.", field)
            _check(field, f"{path}.{name[:100]}", item, depth + 1)


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    names = {"list": "an array", "str": "a string", "bool": "a boolean", "NoneType": "null"}
    return names.get(type(value).__name__, "a number")


def _refusal(message: str, field: str | None = None) -> RequestError:
    return RequestError(400, message, field, "invalid_json" if field is None else "invalid_value")
