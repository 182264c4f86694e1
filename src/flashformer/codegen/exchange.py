"""The buffers through which the CTAs of the CUDA kernel hand values to each other.

kernel/exchange.cuh lays them out the same way; the tests read them back by these names.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashformer.model.spec import LayerSpec
from flashformer.plan.plan import Plan

ALIGNMENT = 256  # bytes


@dataclass(frozen=True, slots=True)
class Buffer:
    """One of them: [rows][width] elements."""

    name: str
    rows: int
    width: int
    element_bytes: int  # 2: 16-bit floats as the weights are, 4: float32
    packet_bytes: int  # that carry one tag; 0: no tags, ordered by barriers, or dated

    @property
    def nbytes(self) -> int:
        """Bytes, with the padding behind."""
        return -(-self.rows * self.width * self.element_bytes // ALIGNMENT) * ALIGNMENT


def exchange(plan: Plan) -> tuple[Buffer, ...]:
    """All buffers in the order of their places: first those of packets."""
    layer, rows = plan.spec.layers[0], plan.machine.max_rows
    hidden = padded(plan.spec.hidden_size)
    travelling = 2 * hidden if residual_travels(plan) else 0  # value, epoch, ...
    partials = rows * layer.num_q_heads * max_chunks(plan, layer)
    return (
        Buffer("hidden_attention", rows, hidden, 2, 16),
        Buffer("hidden_mlp", rows, hidden, 2, 16),
        Buffer("attention", rows, padded(layer.q_rows), 2, 16),
        Buffer("mlp", rows, padded(layer.intermediate_size), 2, 16),
        Buffer("qkv", rows, padded(layer.qkv_rows), 4, 16),
        Buffer("best_logit", rows, plan.machine.num_ctas, 4, 0),
        Buffer("best_id", rows, plan.machine.num_ctas, 4, 0),
        Buffer("top", rows, plan.machine.num_ctas, 4, 0),
        Buffer("stop", 1, 1, 4, 0),
        Buffer("residual_attention", rows, travelling, 4, 0),
        Buffer("residual_mlp", rows, travelling, 4, 0),
        Buffer("partial", partials, 2 * (2 + padded(layer.head_dim)), 4, 0),  # value, epoch, ...
    )


def find_buffer(plan: Plan, name: str) -> tuple[int, Buffer]:
    """Where a buffer begins, in bytes, and what it is."""
    at = 0
    for buffer in exchange(plan):
        if buffer.name == name:
            return at, buffer
        at += buffer.nbytes
    raise KeyError(name)


def read_buffer(plan: Plan, buffer: Buffer, stored: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The elements of a buffer, [rows, width], in the bytes from its begin on."""
    half = np.float16 if plan.options.format == "f16" else ml_dtypes.bfloat16
    dtype = np.float32 if buffer.element_bytes == 4 else half
    shape = buffer.rows, buffer.width
    return stored[: buffer.rows * buffer.width * buffer.element_bytes].view(dtype).reshape(shape)


def residual_travels(plan: Plan) -> bool:
    """Whether o_proj's tiles and down's belong to different CTAs (kernel/hidden.cuh)."""
    return plan.matrix("down", 0).num_tiles < plan.machine.num_ctas


def exchange_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of the exchange's packets, and of all of it."""
    buffers = exchange(plan)
    return sum(b.nbytes for b in buffers if b.packet_bytes), sum(b.nbytes for b in buffers)


def max_chunks(plan: Plan, layer: LayerSpec) -> int:
    """The most chunks that attention cuts one (row, kv head) into (kernel/past.cuh, RowPast)."""
    return -(-plan.machine.num_ctas // layer.num_kv_heads) + 1


def padded(cols: int) -> int:
    """Columns with the padding of the last 16-column block."""
    return -(-cols // 16) * 16
