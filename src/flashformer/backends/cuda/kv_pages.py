"""KV pages on any torch device: between the kernel's order and plain [positions, heads, channels].

kernel/past.cuh (`key_offset`, `value_offset`) defines the order: within a page of one kv head,
blocks of 16 positions x 16 channels hold operand B of mma.m16n8k16. The pages of a layer are
[pages, kv heads, 2, page_tokens x channels] bf16: keys, then values.
"""

from typing import NamedTuple

import torch

BLOCK = 16  # positions, and channels, of one fragment


class Pages(NamedTuple):
    """Pages of one sequence in one layer, in order of position."""

    layer: torch.Tensor  # [pages, kv heads, 2, page_tokens x channels]: all pages of the layer
    ids: torch.Tensor  # int64 [n]


def load_pages(pages: Pages, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `pages` to `keys` and `values` [n page_tokens, heads, channels]."""
    stored = pages.layer[pages.ids]
    _plain_keys(keys, len(stored)).copy_(_stored_keys(stored, keys))
    _plain_values(values, len(stored)).copy_(_stored_values(stored, values))


def store_pages(pages: Pages, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
    """The inverse of `load_pages`; positions from `num_tokens` on become zero."""
    keys[num_tokens:], values[num_tokens:] = 0, 0
    stored = torch.empty_like(pages.layer[: len(pages.ids)])
    _stored_keys(stored, keys).copy_(_plain_keys(keys, len(stored)))
    _stored_values(stored, values).copy_(_plain_values(values, len(stored)))
    pages.layer[pages.ids] = stored


# Both views of keys: [page, block, half of 16 positions, position of 8, head, block of channels,
# quarter of 16 channels, pair of 4, channel of 2].
def _stored_keys(stored: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return _blocks(stored[:, :, 0], keys).permute(0, 2, 6, 4, 1, 3, 5, 7, 8)


def _plain_keys(keys: torch.Tensor, num_pages: int) -> torch.Tensor:
    _, heads, channels = keys.shape
    return keys.view(num_pages, -1, 2, 8, heads, channels // BLOCK, 4, 2, 2)


# Both views of values: [page, block, half of 16 positions, pair of 8, position of 2, head, block of
# channels, half of 16 channels, channel of 8].
def _stored_values(stored: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return _blocks(stored[:, :, 1], values).permute(0, 2, 7, 5, 8, 1, 3, 6, 4)


def _plain_values(values: torch.Tensor, num_pages: int) -> torch.Tensor:
    _, heads, channels = values.shape
    return values.view(num_pages, -1, 2, 4, 2, heads, channels // BLOCK, 2, 8)


def _blocks(stored: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """[page, head, block of positions, block of channels, 8, 4, 2, 2, 2] of keys or values."""
    _, heads, channels = plain.shape
    return stored.view(len(stored), heads, -1, channels // BLOCK, 8, 4, 2, 2, 2)
