"""The slab: room for one matrix at a time, unpacked, or for as much of it as fits.

Matrix + image + slab -> `Operand`, whose pieces say what is unpacked to where, then multiplied. All
views are made once: a prompt of a small model waits for Python otherwise.
"""

from dataclasses import dataclass

import torch

from flashformer.backends.cuda.unpack import dtype_of, padded_cols
from flashformer.plan.plan import Matrix, Plan
from flashformer.quant.formats import TILE_ROWS, Format

SLAB_BYTES = 256 << 20  # of unpacked weights at once


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tiles of a matrix that fit the slab at once."""

    tiles: torch.Tensor  # in the image: uint8 [n, tile_bytes]
    rows: torch.Tensor  # in the slab: [16 n, padded columns]
    weights: torch.Tensor  # of them what counts: [up to 16 n, cols]
    columns: slice  # of the product


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix as products use it: its rows in their order, of gate_up in that of the tiles."""

    weight_format: Format
    dtype: torch.dtype  # of its unpacked weights
    num_rows: int
    cols: int
    tiles: torch.Tensor  # all of them in the image: uint8 [tiles, tile_bytes]
    pieces: tuple[Piece, ...]


def slab_bytes(plan: Plan) -> int:
    """Room for the largest matrix, or for as many of its tiles as SLAB_BYTES holds."""
    largest = max(m.num_tiles * _unpacked_bytes(m) for m in plan.matrices)
    return min(largest, max(SLAB_BYTES, *(_unpacked_bytes(m) for m in plan.matrices)))


def operand_of(matrix: Matrix, image: torch.Tensor, slab: torch.Tensor) -> Operand:
    """Views of `image` and `slab`, both uint8 on one device."""
    weight_format = matrix.weight_format
    stored = image[matrix.offset : matrix.offset + matrix.nbytes]
    tiles = stored.view(matrix.num_tiles, matrix.tile_bytes)
    num_rows = matrix.num_tiles * TILE_ROWS if matrix.name == "gate_up" else matrix.rows
    width, dtype = padded_cols(weight_format, matrix.cols), dtype_of(weight_format)
    step = slab.numel() // _unpacked_bytes(matrix)
    pieces = []
    for start in range(0, matrix.num_tiles, step):
        some = tiles[start : start + step]
        rows = slab.view(dtype)[: len(some) * TILE_ROWS * width].view(-1, width)
        columns = slice(start * TILE_ROWS, min(num_rows, (start + step) * TILE_ROWS))
        weights = rows[: columns.stop - columns.start, : matrix.cols]
        pieces.append(Piece(some, rows, weights, columns))
    return Operand(weight_format, dtype, num_rows, matrix.cols, tiles, tuple(pieces))


def _unpacked_bytes(matrix: Matrix) -> int:
    """Bytes of one unpacked tile."""
    return TILE_ROWS * padded_cols(matrix.weight_format, matrix.cols) * 2
