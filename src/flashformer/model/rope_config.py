"""Reading of rotary embeddings in config.json: v4 `rope_scaling`, v5 `rope_parameters`.

Config fields + the family's rules -> RopeSpec.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashformer.errors import CheckpointError, UnsupportedModelError
from flashformer.model.hf_config import MAX_TOKENS, ConfigReader, is_number, quote
from flashformer.model.rope import frequencies
from flashformer.model.spec import RopeSpec

MIN_FACTOR, MAX_FACTOR = 1e-3, 1e6
# rope type -> numbers that it must have, and may have, beside factor lists
REQUIRED = {"linear": ("factor",), "dynamic": ("factor",)} | {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}


@dataclass(frozen=True, slots=True)
class RopeRules:
    """What a family does with positions; a default is what transformers takes."""

    types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    theta: float = 10000.0
    partial: bool = False  # only the first channels of a head may be rotated
    original_context: int | None = None  # stands beside the rope parameters, not in them


def read_rope(reader: ConfigReader, rules: RopeRules, head_dim: int) -> RopeSpec:
    """The one rotary embedding of a model.

    Raises `UnsupportedModelError` for a type that the family does not have, `CheckpointError` for
    parameters that give no usable table.
    """
    context = reader.integer("max_position_embeddings", 1, MAX_TOKENS, rules.original_context)
    source = "rope_scaling" if reader.fields.get("rope_scaling") else "rope_parameters"
    parameters = ConfigReader(reader.table(source), f"config.json: {source}")
    rope_type = _rope_type(parameters, rules)
    theta = reader.number("rope_theta", 1.001, 1e15, rules.theta)
    theta = parameters.number("rope_theta", 1.001, 1e15, theta)
    rotary_dim = _rotary_dim(reader, parameters, rules, head_dim)
    if rope_type == "dynamic" and rotary_dim == 2:
        raise CheckpointError(
            "config.json: dynamic rope scaling needs more than 2 channels a head; found 2."
        )
    numbers = _numbers(parameters, rope_type)
    if rope_type in ("llama3", "yarn", "longrope"):
        original = _original_context(reader, parameters, rules, context)
        numbers["original_max_position_embeddings"] = original
        numbers.setdefault("factor", context / original)
    if rope_type == "longrope":
        for name in ("long_factor", "short_factor"):
            numbers[name] = _factors(parameters, name, rotary_dim // 2)
    if rope_type == "yarn":
        numbers["truncate"] = parameters.flag("truncate", True)
    rope = RopeSpec(rope_type, theta, rotary_dim, context, tuple(sorted(numbers.items())))
    _require_finite(rope)
    return rope


def _rope_type(parameters: ConfigReader, rules: RopeRules) -> str:
    if any(isinstance(value, dict) for value in parameters.fields.values()):
        raise UnsupportedModelError(
            "The checkpoint has rope parameters for each layer type; FlashFormer supports one "
            "rotary embedding for all layers."
        )
    rope_type = parameters.text("rope_type", parameters.text("type", "default"))
    if rules.original_context and rope_type in ("su", "yarn"):
        return "longrope"  # what Phi-3's first checkpoints called it
    if rope_type not in rules.types:
        raise UnsupportedModelError(
            f"The checkpoint has rope type {quote(rope_type)}; for this family FlashFormer "
            f"supports {', '.join(rules.types)}."
        )
    return rope_type


def _rotary_dim(
    reader: ConfigReader, parameters: ConfigReader, rules: RopeRules, head_dim: int
) -> int:
    partial = reader.number("partial_rotary_factor", 0, 1, 1.0)
    partial = parameters.number("partial_rotary_factor", 0, 1, partial)
    if partial != 1 and not rules.partial:
        raise UnsupportedModelError(
            f"The checkpoint rotates {partial:g} of each head (partial_rotary_factor); "
            "FlashFormer supports that only for Phi-3/4."
        )
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {partial:g} rotates {rotary_dim} channels of "
            f"{head_dim}; expected an even number of at least 2."
        )
    return rotary_dim


def _original_context(
    reader: ConfigReader, parameters: ConfigReader, rules: RopeRules, context: int
) -> int:
    """Tokens of the context before it was extended; a number beside the parameters wins."""
    name = "original_max_position_embeddings"
    inside = parameters.integer(name, 2, MAX_TOKENS, context)
    return reader.integer(name, 2, MAX_TOKENS, rules.original_context or inside)


def _numbers(parameters: ConfigReader, rope_type: str) -> dict[str, Any]:
    """The numbers that the rope type reads; absent optional ones stay absent."""
    numbers: dict[str, Any] = {
        name: parameters.number(name, MIN_FACTOR, MAX_FACTOR)
        for name in REQUIRED.get(rope_type, ())
    }
    for name in OPTIONAL.get(rope_type, ()):
        if parameters.fields.get(name) is not None:
            numbers[name] = parameters.number(name, 0, MAX_FACTOR)
    if rope_type in ("yarn", "longrope") and parameters.fields.get("factor") is not None:
        numbers["factor"] = parameters.number("factor", MIN_FACTOR, MAX_FACTOR)
    return numbers


def _factors(parameters: ConfigReader, name: str, length: int) -> tuple[float, ...]:
    values = parameters.fields.get(name)
    if not isinstance(values, list) or len(values) != length:
        raise parameters.fail(name, f"a list of {length} numbers, half the rotated channels")
    if not all(is_number(v) and MIN_FACTOR <= v <= MAX_FACTOR for v in values):
        raise parameters.fail(name, f"numbers from {MIN_FACTOR:g} to {MAX_FACTOR:g}")
    return tuple(float(v) for v in values)


def _require_finite(rope: RopeSpec) -> None:
    """Refuse parameters that pass one by one but give no usable table together."""
    contexts = (1, rope.max_position_embeddings, MAX_TOKENS)
    try:
        with np.errstate(all="ignore"):
            tables = [frequencies(rope, context) for context in contexts]
        usable = all(
            bool(np.isfinite(table).all() and (table >= 0).all()) and 0 < factor <= MAX_FACTOR
            for table, factor in tables
        )
    except (ValueError, ArithmeticError, TypeError):
        usable = False
    if not usable:
        raise CheckpointError(
            f"config.json: the rope parameters of type {rope.rope_type} give no usable "
            "table of frequencies; expected those of a trained model."
        )
