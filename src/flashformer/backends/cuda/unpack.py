"""Tiles of the image -> rows of a matrix, on any torch device: one function a kind of code.

The inverse of `quant.layout.arrange` for the fragment layout, in torch. A format whose numbers are
not 16-bit floats is decoded to bf16 (`quant.decode` says what its codes mean).
"""

import torch

from flashformer.quant.encode import INT4_ZERO
from flashformer.quant.formats import TILE_ROWS, Format
from flashformer.quant.layout import FP8_BYTES

HALF = TILE_ROWS // 2
LANES = 4  # that share a row of a fragment
PART_WEIGHTS = 1 << 22  # decoded at once: their temporaries stay mostly in a GPU's L2
UNPACKING_BYTES = 20 * PART_WEIGHTS  # at most: five float32 of each weight


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
    if weight_format.bits == 16:
        _unpack_16(tiles, out)
        return
    decode = _unpack_8 if weight_format.bits == 8 else _unpack_4
    step = max(1, PART_WEIGHTS // (TILE_ROWS * out.shape[1]))
    for first in range(0, len(tiles), step):
        rows = out[first * TILE_ROWS : (first + step) * TILE_ROWS]
        decode(tiles[first : first + step], weight_format, rows)


def _unpack_16(tiles: torch.Tensor, out: torch.Tensor) -> None:
    """bf16 and f16: words of two columns move from the order of a fragment to the order of rows."""
    words = _fragments(tiles.view(torch.int32))
    target = out.view(torch.int32)
    target.view(-1, 2, HALF, words.shape[1], LANES, 2).copy_(words.permute(0, 5, 2, 1, 3, 4))


def _unpack_8(tiles: torch.Tensor, weight_format: Format, out: torch.Tensor) -> None:
    """int8 and fp8: words of four columns."""
    split = tiles.shape[1] - weight_format.row_scale_bytes
    words = _fragments(tiles[:, :split].contiguous().view(torch.int32))
    rows = words.permute(0, 5, 2, 1, 3, 4).contiguous().view(len(tiles) * TILE_ROWS, -1)
    if weight_format.floating:
        fours = rows.view(torch.uint8).view(*rows.shape, 4)[..., FP8_BYTES].contiguous()
        codes = fours.view(torch.float8_e4m3fn).flatten(1)
    else:
        codes = rows.view(torch.int8)
    scales = tiles[:, split:].contiguous().view(torch.float32).view(-1, 1)
    out.copy_(codes.float() * scales)


def _fragments(words: torch.Tensor) -> torch.Tensor:
    """[tile, block, row of the half, quarter of the columns, half of those, half of the rows]."""
    return words.view(len(words), -1, HALF, LANES, 2, 2)


def _unpack_4(tiles: torch.Tensor, weight_format: Format, out: torch.Tensor) -> None:
    """int4: bytes of two columns, each with a flipped upper bit; scales and zero-points a block."""
    blocks = tiles.view(len(tiles), -1, weight_format.block_bytes)
    split, start = 2 * TILE_ROWS, weight_format.block_scale_bytes
    scales = _by_rows(blocks[..., :split].contiguous().view(torch.float16)).float()
    steps = min(2, weight_format.block_cols // 32)  # of 32 columns, that a lane holds together
    # [tile, block, load, row of the half, quarter, step, half of the rows, byte]
    shape = (len(tiles), blocks.shape[1], -1, HALF, LANES, steps, 2, 4)
    packed = blocks[..., start:].contiguous().view(shape).permute(0, 6, 3, 1, 2, 5, 4, 7)
    codes = torch.stack(
        (packed & 15, packed >> 4), -2
    ).float()  # low halves: the first four columns
    values = codes.reshape(len(tiles), TILE_ROWS, blocks.shape[1], weight_format.block_cols)
    values = (values + INT4_ZERO) % 16
    if weight_format.zeros:
        values = values - _by_rows(blocks[..., split:start]).float()
    else:
        values = values - INT4_ZERO
    out.copy_((values * scales).view(out.shape))


def _by_rows(stored: torch.Tensor) -> torch.Tensor:
    """[tile, block, 16] as rows 0, 8, 1, 9 ... -> [tile, row, block, 1]."""
    tiles, blocks, _ = stored.shape
    halves = stored.view(tiles, blocks, HALF, 2).permute(0, 3, 2, 1)
    return halves.reshape(tiles, TILE_ROWS, blocks, 1)
