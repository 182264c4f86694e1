"""Rotary position embedding: the inverse frequencies of each rope type.

RopeSpec, context length -> inverse frequencies [rotary_dim / 2] float32, factor on cos and sin.
Sources: RoPE arXiv 2104.09864; linear 2306.15595; dynamic NTK (Reddit, u/bloc97 and u/emozilla);
YaRN 2309.00071; LongRoPE 2402.13753; llama3 in Meta's release of Llama 3.1.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from flashformer.model.spec import RopeSpec

Float32 = npt.NDArray[np.float32]
Parameters = dict[str, Any]


def frequencies(rope: "RopeSpec", context: int) -> tuple[Float32, float]:
    """Inverse frequencies [rotary_dim / 2] and the factor on cos and sin.

    `context` is the number of tokens that a sequence may hold: dynamic and longrope tables depend
    on it, and one table serves every position of every sequence. Intermediate steps are rounded
    to float32 where transformers rounds, so that both agree to the last bits.
    """
    return ROPE_TYPES[rope.rope_type](rope, dict(rope.parameters), context)


def _angular_periods(theta: float, rotary_dim: int) -> Float32:
    """theta^(2 i / rotary_dim); the power in float64, so that every machine rounds alike."""
    exponents = np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)
    powers: Float32 = (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(
        np.float32
    )
    return powers


def _default(rope: "RopeSpec", parameters: Parameters, context: int) -> tuple[Float32, float]:
    return np.float32(1) / _angular_periods(rope.rope_theta, rope.rotary_dim), 1.0


def _linear(rope: "RopeSpec", parameters: Parameters, context: int) -> tuple[Float32, float]:
    plain, _ = _default(rope, parameters, context)
    return plain / np.float32(parameters["factor"]), 1.0


def _dynamic(rope: "RopeSpec", parameters: Parameters, context: int) -> tuple[Float32, float]:
    dim, factor = rope.rotary_dim, parameters["factor"]
    length = max(context, rope.max_position_embeddings)
    growth = factor * length / rope.max_position_embeddings - (factor - 1)
    theta = rope.rope_theta * growth ** (dim / (dim - 2))
    return np.float32(1) / _angular_periods(theta, dim), 1.0


def _llama3(rope: "RopeSpec", parameters: Parameters, context: int) -> tuple[Float32, float]:
    plain, _ = _default(rope, parameters, context)
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelengths > np.float32(original / low), plain / factor, blended)
    return np.where(wavelengths < np.float32(original / high), plain, scaled), 1.0


def _yarn(rope: "RopeSpec", parameters: Parameters, context: int) -> tuple[Float32, float]:
    dim, factor = rope.rotary_dim, parameters["factor"]
    original = parameters["original_max_position_embeddings"]

    def dim_of(num_rotations: float) -> float:
        """The channel that turns `num_rotations` times over the original context."""
        turns = math.log(original / (num_rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(rope.rope_theta))

    low = dim_of(parameters.get("beta_fast") or 32)
    high = dim_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    channels = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((channels - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - ramp
    periods = _angular_periods(rope.rope_theta, dim)
    interpolated = np.float32(1) / (np.float32(factor) * periods)
    extrapolated = np.float32(1) / periods
    return interpolated * (1 - keep) + extrapolated * keep, _yarn_attention_factor(parameters)


def _yarn_attention_factor(parameters: Parameters) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    factor = parameters["factor"]

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1)


def _longrope(rope: "RopeSpec", parameters: Parameters, context: int) -> tuple[Float32, float]:
    original = parameters["original_max_position_embeddings"]
    which = "long_factor" if context > original else "short_factor"
    stretch = np.array(parameters[which], np.float32)
    factor = parameters.get("factor") or rope.max_position_embeddings / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        grown = factor > 1.0
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    periods = _angular_periods(rope.rope_theta, rope.rotary_dim)
    return np.float32(1) / (stretch * periods), float(attention_factor)


ROPE_TYPES: dict[str, Callable[["RopeSpec", Parameters, int], tuple[Float32, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
