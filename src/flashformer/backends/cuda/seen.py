"""What a chunk of a prompt sees in one layer: its past, loaded from the pages, and its own."""

import torch

from flashformer.backends.cuda.kv_pages import BLOCK, Pages
from flashformer.backends.cuda.prefill_ops import PrefillOps
from flashformer.plan.plan import Plan


class Seen:
    """Plain keys and values [positions, kv heads, channels] of one layer after the other."""

    def __init__(self, plan: Plan, kv: torch.Tensor, ops: PrefillOps) -> None:
        """`kv` uint8: [layers][pages][kv heads][keys, values][page], as the kernel addresses it."""
        layer, self._page_tokens = plan.spec.layers[0], plan.machine.page_tokens
        shape = (most_tokens(plan), layer.num_kv_heads, channels(plan))
        self.keys = torch.zeros(shape, dtype=torch.bfloat16, device=kv.device)
        self.values = torch.zeros_like(self.keys)
        page = self._page_tokens * channels(plan)
        stored = kv.view(torch.bfloat16)
        self._layers = stored.view(plan.spec.num_layers, -1, layer.num_kv_heads, 2, page)
        self._ops = ops
        self._begin = 0  # position of the first key here
        self._own = slice(0)  # places of the chunk's rows

    @property
    def max_tokens(self) -> int:
        """Positions that fit."""
        return len(self.keys)

    def open(
        self, layer: int, first: int, rows: int, window: int, pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Load the past of `rows` rows at `first`; where their own keys and values are to be put.

        `pages` int64: the sequence's, from position 0 to the last row's.
        """
        oldest = max(0, first - window + 1) if window else 0
        past = pages[oldest // self._page_tokens : -(-first // self._page_tokens)]
        end = len(past) * self._page_tokens
        if end:
            stored = Pages(self._layers[layer], past)
            self._ops.load_pages(stored, self.keys[:end], self.values[:end])
        self._begin = oldest // self._page_tokens * self._page_tokens
        self._own = slice(first - self._begin, first - self._begin + rows)
        return self.keys[self._own], self.values[self._own]

    def close(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the own keys and values; all that the last row sees, in order of position.

        Positions behind the last row in its page become zero.
        """
        first_page = self._own.start // self._page_tokens  # may begin with the past, just loaded
        start = first_page * self._page_tokens
        places = slice(start, len(pages) * self._page_tokens - self._begin)
        self._ops.store_pages(
            Pages(self._layers[layer], pages[first_page + self._begin // self._page_tokens :]),
            self.keys[places],
            self.values[places],
            self._own.stop - start,
        )
        return self.keys[: self._own.stop], self.values[: self._own.stop]


def channels(plan: Plan) -> int:
    """Of a stored head: head_dim and zeros up to whole fragments."""
    return -(-plan.spec.layers[0].head_dim // BLOCK) * BLOCK


def most_tokens(plan: Plan) -> int:
    """Positions of a full sequence, in whole pages."""
    return -(-plan.options.context // plan.machine.page_tokens) * plan.machine.page_tokens
