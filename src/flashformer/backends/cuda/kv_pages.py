"""The KV pages as tensors: between the kernel's order and plain [positions, heads, head_dim].

kernel/past.cuh (`key_offset`, `value_offset`) defines the order: within a page of one kv head,
blocks of 16 positions x 16 channels hold operand B of mma.m16n8k16.
"""

import torch

from flashformer.plan.plan import Plan

BLOCK = 16  # positions, and channels, of one fragment


class KvPages:
    """All pages of all layers, seen as torch tensors."""

    def __init__(self, plan: Plan, kv: torch.Tensor) -> None:
        """`kv` uint8, [layers][pages][kv heads][keys, values][page], as the kernel addresses it."""
        layer = plan.spec.layers[0]
        self.page_tokens = plan.machine.page_tokens
        self.num_heads = layer.num_kv_heads
        self.channels = -(-layer.head_dim // BLOCK) * BLOCK  # of a stored head; padding is zero
        page = self.page_tokens * self.channels
        self._kv = kv.view(torch.bfloat16).view(plan.spec.num_layers, -1, self.num_heads, 2, page)

    def load(
        self, layer: int, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy `pages` [n] of a layer to `keys` and `values` [n page_tokens, heads, channels]."""
        stored = self._kv[layer, pages]
        self._plain_keys(keys).copy_(self._stored_keys(stored))
        self._plain_values(values).copy_(self._stored_values(stored))

    def store(
        self, layer: int, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """The inverse of `load`: `keys` and `values` fill the pages."""
        stored = torch.empty_like(self._kv[layer, : len(pages)])
        self._stored_keys(stored).copy_(self._plain_keys(keys))
        self._stored_values(stored).copy_(self._plain_values(values))
        self._kv[layer, pages] = stored

    # Both views of keys: [page, block, half of 16 positions, position of 8, head, block of
    # channels, quarter of 16 channels, pair of 4, channel of 2].
    def _stored_keys(self, stored: torch.Tensor) -> torch.Tensor:
        shape = (self.page_tokens // BLOCK, self.channels // BLOCK, 8, 4, 2, 2, 2)
        keys = stored[:, :, 0].view(len(stored), self.num_heads, *shape)
        return keys.permute(0, 2, 6, 4, 1, 3, 5, 7, 8)

    def _plain_keys(self, keys: torch.Tensor) -> torch.Tensor:
        blocks = self.channels // BLOCK
        return keys.view(-1, self.page_tokens // BLOCK, 2, 8, self.num_heads, blocks, 4, 2, 2)

    # Both views of values: [page, block, half of 16 positions, pair of 8, position of 2, head,
    # block of channels, half of 16 channels, channel of 8].
    def _stored_values(self, stored: torch.Tensor) -> torch.Tensor:
        shape = (self.page_tokens // BLOCK, self.channels // BLOCK, 8, 4, 2, 2, 2)
        values = stored[:, :, 1].view(len(stored), self.num_heads, *shape)
        return values.permute(0, 2, 7, 5, 8, 1, 3, 6, 4)

    def _plain_values(self, values: torch.Tensor) -> torch.Tensor:
        blocks = self.channels // BLOCK
        return values.view(-1, self.page_tokens // BLOCK, 2, 4, 2, self.num_heads, blocks, 2, 8)


class Seen:
    """What the rows of a chunk see in one layer: plain keys and values, past and own."""

    def __init__(self, pages: KvPages, most_tokens: int, device: torch.device) -> None:
        """Room for `most_tokens` positions, a multiple of the page."""
        self._pages = pages
        shape = (most_tokens, pages.num_heads, pages.channels)
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.zeros_like(self.keys)
        self._begin = 0  # position of the first key here
        self._own = slice(0)  # places of the chunk's rows

    def open(
        self, layer: int, first: int, rows: int, window: int, pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Load the past of `rows` rows at `first`; where their own keys and values are to be put.

        `pages` int64: the sequence's, from position 0 to the last row's.
        """
        page_tokens = self._pages.page_tokens
        oldest = max(0, first - window + 1) if window else 0
        past = pages[oldest // page_tokens : -(-first // page_tokens)]
        end = len(past) * page_tokens
        if end:
            self._pages.load(layer, past, self.keys[:end], self.values[:end])
        self._begin = oldest // page_tokens * page_tokens
        self._own = slice(first - self._begin, first - self._begin + rows)
        return self.keys[self._own], self.values[self._own]

    def close(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the own keys and values; all that the last row sees, in order of position.

        Positions behind the last row in its page become zero.
        """
        page_tokens = self._pages.page_tokens
        first_page = self._own.start // page_tokens  # may hold positions of the past, just loaded
        places = slice(first_page * page_tokens, len(pages) * page_tokens - self._begin)
        self.keys[self._own.stop : places.stop] = 0
        self.values[self._own.stop : places.stop] = 0
        own_pages = pages[first_page + self._begin // page_tokens :]
        self._pages.store(layer, own_pages, self.keys[places], self.values[places])
        return self.keys[: self._own.stop], self.values[: self._own.stop]
