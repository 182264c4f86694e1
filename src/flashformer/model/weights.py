"""Logical tensors by role: the only way the planner and the packer see weights.

`WeightSource.tensor("q_proj", layer)` -> array, whatever the file calls it and however it is fused.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# role -> shape, as functions of the spec; layer roles take the layer's record.
MODEL_ROLES = ("embed_tokens", "norm", "lm_head")
LAYER_ROLES = (
    "input_layernorm",  # [hidden_size]
    "q_proj",  # [q_rows, hidden_size]
    "k_proj",  # [kv_rows, hidden_size]
    "v_proj",  # [kv_rows, hidden_size]
    "q_bias",  # [q_rows], if qkv_bias; likewise k_bias, v_bias
    "k_bias",
    "v_bias",
    "q_norm",  # [head_dim], if qk_norm
    "k_norm",
    "o_proj",  # [hidden_size, q_rows]
    "o_bias",
    "post_attention_layernorm",  # [hidden_size]
    "gate_proj",  # [intermediate_size, hidden_size]
    "up_proj",
    "gate_bias",
    "up_bias",
    "down_proj",  # [hidden_size, intermediate_size]
    "down_bias",
)


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or random numbers of the same shapes."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any weight may have changed; goes into the image's cache key."""
        ...

    def tensor(self, role: str, layer: int = -1) -> Array:
        """The tensor of `role`, 2-D [rows, cols] or 1-D, dtype bfloat16 (ml_dtypes), float16 or float32.

        Memory-mapped and read-only where the source is a file. `lm_head` of a tied model is the
        embedding. Raises `CheckpointError` when the tensor is missing or has another shape.
        """
        ...


def as_float32(array: Array) -> npt.NDArray[np.float32]:
    """A float32 copy (or view, if it is float32 already)."""
    return np.asarray(array, dtype=np.float32)
