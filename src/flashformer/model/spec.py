"""What is computed: every number of the architecture.

HF config dict -> `ModelSpec`, one record per layer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary embedding table: the parameters, from which `frequencies` derives the numbers."""

    rope_type: str  # default | linear | dynamic | llama3 | yarn | longrope
    rope_theta: float
    rotary_dim: int  # the first channels of a head, rotated in pairs (i, i + rotary_dim / 2)
    max_position_embeddings: int
    # what else the type needs (factor, low_freq_factor ...): sorted pairs, lists as tuples
    parameters: tuple[tuple[str, Any], ...] = ()

    def frequencies(self, context: int) -> tuple[npt.NDArray[np.float32], float]:
        """Inverse frequencies [rotary_dim / 2] and the factor on cos and sin.

        `context`: tokens that a sequence may hold; some types choose the table by it.
        """
        from flashformer.model.rope import frequencies

        return frequencies(self, context)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_idx: int  # index into ModelSpec.ropes; -1: no position embedding (NoPE)
    window: int  # a token sees the last `window` tokens, itself included; 0: all
    qk_norm: bool  # RMSNorm of every q and k head before RoPE
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool  # gate, up and down
    attention_scale: float  # multiplies q . k

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of q, k and v together, in this order."""
        return self.q_rows + 2 * self.kv_rows


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: RMSNorm, grouped-query attention, gated SiLU MLP, per-layer records."""

    model_type: str
    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @staticmethod
    def from_hf(
        config: dict[str, Any], generation_config: dict[str, Any] | None = None
    ) -> "ModelSpec":
        """Read config.json; the end-of-text ids come from generation_config.json if it has some.

        Refuses with `UnsupportedModelError` what is not implemented, with `CheckpointError` what
        makes no sense.
        """
        from flashformer.model.families import spec_from_hf

        return spec_from_hf(config, generation_config)
