"""Typed reading of HF's config.json: a field is what it should be, or one sentence says why not.

Config dict -> Python values.
"""

import math
from dataclasses import dataclass
from typing import Any

from flashformer.errors import CheckpointError

MAX_TOKENS = (1 << 31) - 1  # of contexts and windows
MAX_LISTED_CHARS = 60  # of a wrong value quoted in an error


def quote(value: object) -> str:
    """A value as an error shows it: short, on one line."""
    text = repr(value)
    return text if len(text) <= MAX_LISTED_CHARS else text[: MAX_LISTED_CHARS - 3] + "..."


def is_int(value: object) -> bool:
    """True for an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for a finite integer or float that a float64 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Fields of a JSON object. A field that is absent or null takes the default, if there is one.

    Every method raises `CheckpointError` when the field has the wrong type or an absurd value.
    """

    fields: dict[str, Any]
    where: str = "config.json"

    def fail(self, name: str, expected: str) -> CheckpointError:
        """The error for a field that is wrong."""
        if self.fields.get(name) is None:
            return CheckpointError(f"{self.where} has no {name}; expected {expected}.")
        return CheckpointError(
            f"{self.where}: {name} is {quote(self.fields[name])}; expected {expected}."
        )

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in low .. high."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and is_int(value) and low <= value <= high:
            return value
        raise self.fail(name, f"an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in low .. high."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if value is not None and is_number(value) and low <= value <= high:
            return float(value)
        raise self.fail(name, f"a number from {low:g} to {high:g}")

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise self.fail(name, "true or false")

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, str):
            return value
        raise self.fail(name, "a string")

    def items(self, name: str, length: int) -> tuple[Any, ...] | None:
        """A list with at least `length` entries, cut to `length`; None when absent."""
        value = self.fields.get(name)
        if value is None:
            return None
        if isinstance(value, list) and len(value) >= length:
            return tuple(value[:length])
        raise self.fail(name, f"a list with an entry for each of the {length} layers")

    def table(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when absent."""
        value = self.fields.get(name)
        if value is None:
            return {}
        if isinstance(value, dict):
            return value
        raise self.fail(name, "a JSON object")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them, without repeats; empty when absent."""
        value = self.fields.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if all(is_int(i) and 0 <= i < 2**31 for i in ids):
            return tuple(dict.fromkeys(ids))
        raise self.fail(name, "a token id or a list of token ids")
