"""Tiles of the image -> rows of a matrix, on any torch device: one function a format.

The inverse of `quant.layout.arrange` for the fragment layout, in torch. A format whose numbers are
not 16-bit floats is decoded to bf16 (`quant.decode` says what its codes mean).
"""

from collections.abc import Callable

import torch

from flashformer.quant.formats import TILE_ROWS, Format

BLOCK_COLS = 16  # columns of one fragment of a 16-bit format


def dtype_of(weight_format: Format) -> torch.dtype:
    """What a matrix of this format is unpacked to, and what it is multiplied with."""
    return torch.float16 if weight_format.name == "f16" else torch.bfloat16


def padded_cols(weight_format: Format, cols: int) -> int:
    """Columns of an unpacked row: whole blocks; those beyond `cols` are zero."""
    return weight_format.num_blocks(cols) * weight_format.block_cols


def unpack(tiles: torch.Tensor, weight_format: Format, out: torch.Tensor) -> None:
    """Write `tiles` uint8 [n, tile_bytes] as rows into `out` [16 n, padded columns].

    `out` is contiguous and of `dtype_of` the format. Rows keep the order in which they are stored.
    """
    UNPACKERS[weight_format.name](tiles, out)


def _unpack_16(tiles: torch.Tensor, out: torch.Tensor) -> None:
    """bf16 and f16: words of two columns move from the order of a fragment to the order of rows."""
    blocks = out.shape[1] // BLOCK_COLS
    half = TILE_ROWS // 2
    # [tile, block, row of the half, quarter of the columns, column pair, half of the rows]
    words = tiles.view(torch.int32).view(-1, blocks, half, 4, 2, 2)
    target = out.view(torch.int32).view(-1, 2, half, blocks, 4, 2)
    target.copy_(words.permute(0, 5, 2, 1, 3, 4))


UNPACKERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "bf16": _unpack_16,
    "f16": _unpack_16,
}
