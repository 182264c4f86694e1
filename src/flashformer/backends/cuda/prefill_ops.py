"""What a prompt needs besides matrix products, as functions of torch tensors on any device."""

import torch
from torch.nn import functional

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos, sin: float32 [rows, 1, rotary_dim / 2]


def multiply(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Out [rows, n] = x [rows, cols] @ weights [n, cols], summed in float32, rounded once."""
    if not x.is_cuda:  # no product of 16 bits with a float32 result there
        out.copy_(x.float() @ weights.float().T)
    elif out.dtype == x.dtype:
        torch.mm(x, weights.T, out=out)
    else:
        torch.mm(x, weights.T, out_dtype=out.dtype, out=out)


def add_norm(
    hidden: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `update` to `hidden` (float32 [rows, hidden_size], in place); RMSNorm of the sum."""
    if update is not None:
        hidden += update
    return functional.rms_norm(hidden, hidden.shape[-1:], weight, eps)


def rotations(inv_freq: torch.Tensor, factor: float, first: int, rows: int) -> Rotation:
    """Cos and sin of `rows` positions from `first` on, the attention factor included."""
    positions = torch.arange(first, first + rows, device=inv_freq.device, dtype=torch.float32)
    angles = positions[:, None, None] * inv_freq
    return angles.cos() * factor, angles.sin() * factor


def turn(heads: torch.Tensor, rotation: Rotation | None, out: torch.Tensor) -> None:
    """RoPE of float32 `heads` [rows, n, head_dim] into `out` [rows, n, channels], rounded there.

    Halves of the rotated channels are paired; `out` may have more channels, which stay.
    """
    if rotation is None:
        out[..., : heads.shape[-1]] = heads
        return
    cos, sin = rotation
    half = cos.shape[-1]
    low, high = heads[..., :half], heads[..., half : 2 * half]
    out[..., :half] = torch.addcmul(low * cos, high, sin, value=-1)
    out[..., half : 2 * half] = torch.addcmul(high * cos, low, sin)
    out[..., 2 * half : heads.shape[-1]] = heads[..., 2 * half :]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Causal attention of the last rows of a sequence: [rows, q heads, channels].

    `query` [rows, q heads, channels]; `keys`, `values` [positions, kv heads, channels]; the last
    row sits at the last position. A row sees its last `window` positions (0: all).
    """
    rows, seen = len(query), len(keys)
    if query.is_cuda:
        # The op below scaled_dot_product_attention: that one knows neither a window nor a causal
        # mask that ends in the lower right corner.
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            query[None], keys[None], values[None], None, None, rows, seen, 0.0, True, False,
            scale=scale, window_size_left=window - 1, window_size_right=0,
        )[0]  # fmt: skip
        return out[0]
    at = torch.arange(seen - rows, seen, device=query.device)[:, None]
    position = torch.arange(seen, device=query.device)
    mask = (position <= at) & (position > at - (window or seen))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    attended = functional.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), mask, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


def activate(pairs: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up from the order of the tiles: [rows, tiles, 2, 8] -> [rows, 8 tiles]."""
    return (functional.silu(pairs[:, :, 0]) * pairs[:, :, 1]).flatten(1)
