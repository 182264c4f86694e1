"""Logical tensors by role: the only way the planner and the packer see weights.

`WeightSource.tensor("q_proj", layer)` -> array, whatever the file calls it and however it is fused.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashformer.errors import CheckpointError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.roles import TensorPart, layer_roles, locate, model_roles, role_shape
from flashformer.model.safetensors_file import DTYPES
from flashformer.model.spec import ModelSpec

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
FORMAT_OF_DTYPE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
UNUSED_TENSORS = ("rotary_emb.inv_freq",)  # old Llama checkpoints store a table that we compute

RANDOM_STD = 0.02
RANDOM_ELEMS = (1 << 24) + (1 << 20)  # of the block that all random tensors are cut from
RANDOM_OFFSETS = 1 << 20
RANDOM_NORM = 0.1  # norm weights lie within 1 +- this
RANDOM_DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or random numbers of the same shapes."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any weight may have changed; goes into the image's cache key."""
        ...

    def tensor(self, role: str, layer: int = -1) -> Array:
        """The tensor of `role`, 2-D [rows, cols] or 1-D: bfloat16 (ml_dtypes), float16 or float32.

        Memory-mapped and read-only where the source is a file. `lm_head` of a tied model is the
        embedding. Raises `CheckpointError` when the tensor is missing or has another shape.
        """
        ...

    def release(
        self, role: str, layer: int = -1, first_row: int = 0, num_rows: int | None = None
    ) -> None:
        """Some rows are not needed for now: their memory may go. They can be read again."""
        ...


def as_float32(array: Array) -> npt.NDArray[np.float32]:
    """A float32 copy (or view, if it is float32 already)."""
    return np.asarray(array, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """The weights of a checkpoint; every shape and dtype is checked when this is made.

    Raises `CheckpointError` for a tensor that is missing, misshapen, or not part of the model.
    """

    checkpoint: Checkpoint
    spec: ModelSpec

    def __post_init__(self) -> None:
        expected = set()
        for layer, role in every_role(self.spec):
            part = locate(self.spec, role, layer)
            self._check(part)
            expected.add(part.name)
        for name in self.checkpoint.names:
            in_layer = name.startswith("model.layers.")
            if in_layer and name not in expected and not name.endswith(UNUSED_TENSORS):
                raise CheckpointError(
                    f"{self.checkpoint.folder} holds {name}, which config.json does not describe; "
                    "expected a config.json and weights of the same model."
                )

    @property
    def fingerprint(self) -> str:
        """Changes whenever a file of the checkpoint changes."""
        return self.checkpoint.fingerprint

    @property
    def dtype(self) -> str:
        """The checkpoint's format, taken from the first layer's q_proj: bf16, f16 or f32."""
        name = locate(self.spec, "q_proj", 0).name
        return FORMAT_OF_DTYPE[self.checkpoint.entry(name).dtype]

    def tensor(self, role: str, layer: int = -1) -> Array:
        """See `WeightSource.tensor`; a fused projection gives a view of its rows."""
        part = locate(self.spec, role, layer)
        whole = self.checkpoint.tensor(part.name)
        return whole[part.first_row : part.first_row + part.shape[0]]

    def release(
        self, role: str, layer: int = -1, first_row: int = 0, num_rows: int | None = None
    ) -> None:
        """See `WeightSource.release`."""
        part = locate(self.spec, role, layer)
        rows = part.shape[0] - first_row if num_rows is None else num_rows
        self.checkpoint.release(part.name, part.first_row + first_row, rows)

    def _check(self, part: TensorPart) -> None:
        entry = self.checkpoint.entry(part.name)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {part.name} has dtype {entry.dtype}; expected one of "
                f"{', '.join(DTYPES)}."
            )
        if entry.shape != part.tensor_shape:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {part.name} has shape {list(entry.shape)}; config.json "
                f"asks for {list(part.tensor_shape)}."
            )


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Random numbers in the shapes of a model, for benchmarks; the same seed gives the same bits.

    All tensors are views of one block of 17 million normal numbers (std 0.02), so that a model of
    any size costs 35 MB. Rows of a large tensor overlap: row i + 1 starts a few numbers after row
    i. Norm weights are near 1.
    """

    spec: ModelSpec
    seed: int = 0
    dtype: str = "bf16"  # bf16 | f16 | f32
    block: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind = RANDOM_DTYPES[self.dtype]
        block = np.empty(RANDOM_ELEMS, kind)
        random = np.random.default_rng(self.seed)
        for first in range(0, RANDOM_ELEMS, RANDOM_OFFSETS):
            part = block[first : first + RANDOM_OFFSETS]
            part[...] = random.standard_normal(len(part), np.float32) * np.float32(RANDOM_STD)
        block.flags.writeable = False
        object.__setattr__(self, "block", block)

    @property
    def fingerprint(self) -> str:
        """Of the spec, the seed and the dtype."""
        text = repr(("random", 1, self.spec, self.seed, self.dtype))
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor(self, role: str, layer: int = -1) -> Array:
        """See `WeightSource.tensor`; a read-only view whose rows are contiguous and may overlap."""
        if role == "lm_head" and self.spec.tie_word_embeddings:
            role = "embed_tokens"
        shape = role_shape(self.spec, role, layer)
        where = hashlib.sha256(f"{self.seed} {role} {layer}".encode()).digest()
        # multiples of 16 numbers: rows are as well aligned as those of a file
        offset = int.from_bytes(where[:4], "little") % RANDOM_OFFSETS // 16 * 16
        if role.endswith("norm"):
            values = as_float32(self.block[offset : offset + shape[0]])
            return (1 + values * (RANDOM_NORM / RANDOM_STD / 4)).astype(self.block.dtype)
        cols = shape[-1]
        room = RANDOM_ELEMS - RANDOM_OFFSETS - cols
        rows = shape[0] if len(shape) == 2 else 1
        step = cols if rows * cols <= room else room // rows // 16 * 16
        view = np.lib.stride_tricks.as_strided(
            self.block[offset:],
            (rows, cols),
            (step * self.block.itemsize, self.block.itemsize),
            writeable=False,
        )
        return view if len(shape) == 2 else view[0]

    def release(
        self, role: str, layer: int = -1, first_row: int = 0, num_rows: int | None = None
    ) -> None:
        """Nothing to give back: the block serves every tensor."""


class AnyWeights(RandomWeights):
    """Random weights of which only the speed is asked: a backend may make others of its own."""

    __slots__ = ()


def every_role(spec: ModelSpec) -> list[tuple[int, str]]:
    """Layer (-1: none) and role of every tensor of a model."""
    layers = [(i, role) for i, layer in enumerate(spec.layers) for role in layer_roles(layer)]
    return [(-1, role) for role in model_roles(spec)] + layers
