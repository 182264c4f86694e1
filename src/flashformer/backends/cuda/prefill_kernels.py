"""The steps of a prompt between matrix products, as kernels: each reads and writes memory once."""

import torch

from flashformer.backends.cuda.compile import compile_kernel
from flashformer.backends.cuda.kv_pages import Pages
from flashformer.backends.cuda.launch import Functions
from flashformer.backends.cuda.prefill_ops import Heads, PrefillOps, Rotation, Update, Vectors
from flashformer.backends.cuda.unpack import unpack
from flashformer.plan.plan import Plan
from flashformer.quant.formats import TILE_ROWS, Format

THREADS = 256  # of every kernel in kernel/prefill.cu
WARPS = THREADS // 32
SPAN_BLOCKS = 8  # of a tile, which one warp unpacks
BLOCK_BYTES = 512  # of one fragment of 16 bits
QUAD = 8  # elements that one thread moves between pages and rows: 2 positions of 4 channels
NAMES = ("unpack_16", "add_norm", "split_heads", "activate", "blend", "load_pages", "store_pages")


class KernelOps(PrefillOps):
    """The steps on a GPU, through kernel/prefill.cu. All tensors are contiguous."""

    def __init__(self, plan: Plan) -> None:
        """Compiles, or takes from the cache, what `plan` needs."""
        self._functions = Functions(compile_kernel(plan, "prefill"), NAMES, THREADS)
        self._stream = torch.cuda.current_stream().cuda_stream

    def unpack(self, tiles: torch.Tensor, weight_format: Format, out: torch.Tensor) -> None:
        """See `unpack.unpack`; formats without a kernel go through torch."""
        if weight_format.bits != 16:
            unpack(tiles, weight_format, out)
            return
        blocks = tiles.shape[1] // BLOCK_BYTES
        warps = len(tiles) * -(-blocks // SPAN_BLOCKS)
        self._launch("unpack_16", -(-warps // WARPS), tiles, out, len(tiles), blocks)

    def add_norm(
        self, hidden: torch.Tensor, update: Update | None, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `PrefillOps`; one CTA a row."""
        added = update or (None, None)
        self._launch("add_norm", len(hidden), hidden, *added, weight, out, _is_f16(out))

    def split_heads(
        self, qkv: torch.Tensor, vectors: Vectors, rotation: Rotation | None, heads: Heads
    ) -> None:
        """See `PrefillOps`; one warp a head of a row."""
        norms = vectors.get("q_norm"), vectors.get("k_norm")
        warps = len(qkv) * sum(part.shape[1] for part in heads)
        arguments = (qkv, vectors.get("qkv_bias"), *norms, *(rotation or (None, None)), *heads)
        self._launch("split_heads", -(-warps // WARPS), *arguments, len(qkv))

    def activate(
        self,
        pairs: torch.Tensor,
        bias: torch.Tensor | None,
        stored: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See `PrefillOps`; one thread a tile of a row."""
        tiles = pairs.shape[1] // TILE_ROWS
        count = len(pairs) * tiles
        arguments = (pairs, bias, stored, out, count, tiles, _is_f16(out))
        self._launch("activate", -(-count // THREADS), *arguments)

    def blend(self, out: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> None:
        """See `PrefillOps`, for queries' heads; one thread eight channels."""
        count = out.numel() // 8
        self._launch("blend", -(-count // THREADS), out, other, share, count, len(out))

    def load_pages(self, pages: Pages, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `kv_pages.load_pages`."""
        num_ctas = -(-keys.numel() // (QUAD * THREADS))
        self._launch("load_pages", num_ctas, *pages, keys, values, len(pages.ids))

    def store_pages(
        self, pages: Pages, keys: torch.Tensor, values: torch.Tensor, num_tokens: int
    ) -> None:
        """See `kv_pages.store_pages`; `keys` and `values` stay as they are."""
        num_ctas = -(-keys.numel() // (QUAD * THREADS))
        arguments = (*pages, keys, values, len(pages.ids), num_tokens)
        self._launch("store_pages", num_ctas, *arguments)

    def _launch(self, name: str, num_ctas: int, *arguments: torch.Tensor | int | None) -> None:
        if num_ctas:
            self._functions.launch(name, num_ctas, self._stream, *map(_value, arguments))


def _value(argument: torch.Tensor | int | None) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument or 0


def _is_f16(tensor: torch.Tensor) -> int:
    return int(tensor.dtype == torch.float16)
