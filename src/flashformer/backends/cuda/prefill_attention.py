"""Attention of a prompt's rows: flash attention of any shape, or cuDNN's in whole blocks.

cuDNN is twice as fast from Hopper on, but builds a program for each shape when it meets it, and its
causal mask is a square. So it gets chunks of one size, and their past in blocks of powers of two
chunks: half a dozen shapes serve every context.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional

from flashformer.backends.cuda.prefill_ops import PrefillOps

HOPPER = 9  # the major version from which on cuDNN is ahead


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


def attend_in_blocks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, ops: PrefillOps
) -> torch.Tensor:
    """`attend` without a window, of a chunk whose past is a whole number of chunks."""
    rows, past = len(query), len(keys) - len(query)
    out, lse = _attend_block(query, keys[past:], values[past:], scale, causal=True)
    for begin, end in past_blocks(past, rows):
        other, other_lse = _attend_block(query, keys[begin:end], values[begin:end], scale)
        ops.blend(out, other, torch.sigmoid(other_lse - lse))
        lse = torch.logaddexp(lse, other_lse)
    return out


def past_blocks(past: int, rows: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the blocks of `past` positions: powers of two times `rows`, falling."""
    begin, chunks = 0, past // rows
    while begin < past:
        end = begin + rows * (1 << (chunks.bit_length() - 1))
        chunks -= (end - begin) // rows
        yield begin, end
        begin = end


def blocks_are_fast(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether this is a GPU on which cuDNN is the faster one, and it takes such heads.

    `query` [rows, q heads, channels] and `keys` [rows, kv heads, channels] have as many rows.
    """
    if not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] < HOPPER:
        return False
    q, k = (x.transpose(0, 1)[None] for x in (query, keys))
    parameters = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, True)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def _attend_block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over some positions, and log of the sums of exp(score): [q heads, rows] float32."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    if query.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out[0].transpose(0, 1).contiguous(), lse.reshape(q.shape[1:3])
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    out = scores.softmax(-1).to(q.dtype) @ v
    return out[0].transpose(0, 1).contiguous(), scores[0].logsumexp(-1)
