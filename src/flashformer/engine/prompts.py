"""The forms in which a caller may write a prompt.

A text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids} -> `Prompt`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashformer.engine.tokenizer import Tokenizer
from flashformer.errors import UsageError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for the engine."""

    text: str | None  # None if token ids were given
    token_ids: Sequence[int]


def read_prompts(value: object, tokenizer: Tokenizer | None) -> list[Prompt]:
    """One prompt in any form, or a list of prompts; raises `UsageError` for anything else."""
    if not _is_list(value) or _is_ids(value):
        return [read_prompt(value, tokenizer)]
    return [read_prompt(item, tokenizer) for item in value]  # type: ignore[attr-defined]


def read_prompt(value: object, tokenizer: Tokenizer | None) -> Prompt:
    """One prompt in any form."""
    if isinstance(value, Mapping):
        if "prompt_token_ids" in value:
            value = value["prompt_token_ids"]
            if not _is_list(value):
                raise UsageError(
                    f"prompt_token_ids must be a list of token ids, not a {type(value).__name__}."
                )
        elif isinstance(value.get("prompt"), str):
            value = value["prompt"]
    if isinstance(value, str):
        return Prompt(value, required(tokenizer, "a text prompt").encode(value))
    if _is_list(value):
        return Prompt(None, value)  # type: ignore[arg-type]
    raise UsageError(
        "a prompt must be a text, a list of token ids or {'prompt_token_ids': [...]}, not a "
        f"{type(value).__name__}."
    )


def required(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    """The tokenizer, or the sentence that says why `what` is not possible."""
    if tokenizer is None:
        raise UsageError(
            f"{what} needs a tokenizer, but the checkpoint has no tokenizer.json; give token ids "
            "instead, or add the file."
        )
    return tokenizer


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | range | np.ndarray)


def _is_ids(value: object) -> bool:
    """Whether a list is one prompt of token ids; an empty list is a list of no prompts."""
    first = next(iter(value), None)  # type: ignore[call-overload]
    return first is not None and not isinstance(first, str | Mapping) and not _is_list(first)
