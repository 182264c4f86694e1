"""What a prompt needs besides matrix products and attention, in torch on any device.

This is the meaning; on a GPU `prefill_kernels` does the same in one pass over memory each.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from flashformer.backends.cuda.kv_pages import Pages, load_pages, store_pages
from flashformer.backends.cuda.unpack import unpack
from flashformer.quant.formats import TILE_ROWS, Format

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos, sin: float32 [rows, rotary_dim / 2]
Vectors = Mapping[str, torch.Tensor]  # of one layer: float32


class Heads(NamedTuple):
    """Of the rows of a chunk: [rows, heads, channels] each."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Update(NamedTuple):
    """What a layer adds to the hidden state: float32."""

    rows: torch.Tensor  # [rows, hidden_size]
    bias: torch.Tensor | None = None  # [hidden_size]


class PrefillOps(Protocol):
    """The steps between products: `TorchOps` says what they compute, `KernelOps` is fast.

    `out` gives the type to which a result is rounded.
    """

    def unpack(self, tiles: torch.Tensor, weight_format: Format, out: torch.Tensor) -> None:
        """See `unpack.unpack`."""
        ...

    def add_norm(
        self, hidden: torch.Tensor, update: Update | None, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Add `update` to `hidden` (float32 [rows, cols], in place); RMSNorm of it into `out`."""
        ...

    def split_heads(
        self, qkv: torch.Tensor, vectors: Vectors, rotation: Rotation | None, heads: Heads
    ) -> None:
        """Bias, QK-norm and RoPE of float32 `qkv` [rows, qkv_rows], into `heads`.

        Channels beyond head_dim become zero. Halves of the rotated channels are paired.
        """
        ...

    def activate(
        self,
        pairs: torch.Tensor,
        bias: torch.Tensor | None,
        stored: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """silu(gate) x up: `pairs` [rows, 16 tiles] as they are stored -> [rows, 8 tiles] by rows.

        `stored`: `Matrix.stored_tiles` of gate_up, int32 [tiles].
        """
        ...

    def blend(self, out: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> None:
        """Move `out` by `share` (float32 [heads, rows]) towards `other` [rows, heads, channels]."""
        ...

    def load_pages(self, pages: Pages, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `kv_pages.load_pages`."""
        ...

    def store_pages(
        self, pages: Pages, keys: torch.Tensor, values: torch.Tensor, num_tokens: int
    ) -> None:
        """See `kv_pages.store_pages`; what `keys` and `values` hold behind `num_tokens` is lost."""
        ...


class TorchOps(PrefillOps):
    """The steps as plain torch."""

    unpack = staticmethod(unpack)
    load_pages = staticmethod(load_pages)
    store_pages = staticmethod(store_pages)

    def __init__(self, head_dim: int, eps: float) -> None:
        self._head_dim, self._eps = head_dim, eps

    def add_norm(
        self, hidden: torch.Tensor, update: Update | None, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `PrefillOps`."""
        if update is not None:
            hidden += update.rows if update.bias is None else update.rows + update.bias
        out.copy_(self._norm(hidden, weight))

    def split_heads(
        self, qkv: torch.Tensor, vectors: Vectors, rotation: Rotation | None, heads: Heads
    ) -> None:
        """See `PrefillOps`."""
        if "qkv_bias" in vectors:
            qkv = qkv + vectors["qkv_bias"][: qkv.shape[1]]
        first_key = heads.query.shape[1]
        first_value = first_key + heads.keys.shape[1]
        plain = qkv.view(len(qkv), -1, self._head_dim)
        split = plain.tensor_split((first_key, first_value), dim=1)
        for part, out, norm in zip(split, heads, ("q_norm", "k_norm", ""), strict=True):
            values = self._norm(part, vectors[norm]) if norm in vectors else part
            if norm and rotation is not None:
                values = _rotate(values, *rotation)
            out[..., : self._head_dim] = values
            out[..., self._head_dim :] = 0

    def activate(
        self,
        pairs: torch.Tensor,
        bias: torch.Tensor | None,
        stored: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See `PrefillOps`."""
        both = pairs.float() if bias is None else pairs + bias
        gate, up = both.view(len(pairs), -1, 2, TILE_ROWS // 2).unbind(2)
        by_tiles = (functional.silu(gate) * up).to(out.dtype)
        out.view(by_tiles.shape)[:, stored.long()] = by_tiles

    def blend(self, out: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> None:
        """See `PrefillOps`."""
        out.copy_(torch.lerp(out.float(), other.float(), share.T[..., None]))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, self._eps)


def rotations(inv_freq: torch.Tensor, factor: float, first: int, rows: int) -> Rotation:
    """Cos and sin of `rows` positions from `first` on, the attention factor included."""
    positions = torch.arange(first, first + rows, device=inv_freq.device, dtype=torch.float32)
    angles = positions[:, None] * inv_freq
    return angles.cos() * factor, angles.sin() * factor


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    low, high, rest = heads.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def multiply(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Out [rows, n] = x [rows, cols] @ weights [n, cols], summed in float32, rounded once."""
    if not x.is_cuda:  # no product of 16 bits with a float32 result there
        out.copy_(x.float() @ weights.float().T)
    elif out.dtype == x.dtype:
        torch.mm(x, weights.T, out=out)
    else:
        torch.mm(x, weights.T, out_dtype=out.dtype, out=out)
