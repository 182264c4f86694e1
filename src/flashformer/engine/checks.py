"""Checks of single values that come from a caller; one sentence for every mistake.

(parameter, value) -> the value in its plain type, or a `ParameterError`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import SupportsFloat, SupportsIndex

from flashformer.errors import ParameterError


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int; numpy integers count, booleans and floats do not."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ParameterError(name, f"must be an integer, not {shown(value)}")
    result = int(value.__index__())
    if not low <= result <= high:
        raise ParameterError(name, f"must be between {low} and {high}, not {shown(result)}")
    return result


def number(name: str, value: object, low: float, high: float) -> float:
    """`value` as a float within [low, high]; NaN is refused."""
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        raise ParameterError(name, f"must be a number, not {shown(value)}")
    try:
        result = float(value)
    except (OverflowError, TypeError, ValueError):
        result = math.nan
    if not low <= result <= high:  # false for NaN too
        raise ParameterError(name, f"must be between {low:g} and {high:g}, not {shown(value)}")
    return result


def boolean(name: str, value: object) -> bool:
    """`value`, which must be a bool."""
    if not isinstance(value, bool):
        raise ParameterError(name, f"must be true or false, not {shown(value)}")
    return value


def token_ids(name: str, value: object, limit: int) -> tuple[int, ...]:
    """At most `limit` token ids; whether a vocabulary holds them is checked later."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ParameterError(name, f"must be a list of token ids, not {shown(value)}")
    ids = tuple(value)
    if len(ids) > limit:
        raise ParameterError(name, f"may hold at most {limit} token ids, not {len(ids)}")
    return tuple(integer(name, token_id, 0, 2**31 - 1) for token_id in ids)


def text(name: str, value: object, max_bytes: int) -> str:
    """`value` as a string of valid Unicode, at most `max_bytes` of UTF-8."""
    if not isinstance(value, str):
        raise ParameterError(name, f"must be a string, not {shown(value)}")
    try:
        length = len(value.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ParameterError(
            name,
            f"is not valid Unicode: there is half of a surrogate pair at character {error.start}",
        ) from None
    if length > max_bytes:
        raise ParameterError(name, f"may hold at most {max_bytes} bytes, not {length}")
    return value


def shown(value: object) -> str:
    """`value` as it appears in a sentence, never long."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    words = ascii(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return words if len(words) <= 40 else words[:37] + "..."
