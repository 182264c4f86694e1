"""bfloat16 in 12 bits, without loss: an index for the upper byte, the lower byte as it is.

The upper byte of a bfloat16 (sign, seven bits of the exponent) takes few values: the weights of a
tile lie within some powers of two. A tile has a table of 16 of them, 0 and the 15 most frequent
others. A weight with another upper byte is an exception: its code is +0, and its place and value
stand in the tile's head. Among normally distributed weights about one in 8000 is one.

head      table [16 bytes], row_ends [16 x uint16], exceptions {column, bits: uint16} row after row
          in the order of the columns, zeros up to whole cache lines
block     for each 8 columns three lines of 64 bytes: the indices, those of columns 0 .. 3 in the
          low halves of the bytes, of 4 .. 7 in the high halves; the lower bytes of columns 0 .. 3;
          of 4 .. 7. In a line: [4 rows' group][column pair][4 rows][2 columns], so that
          interleaving the bytes of 16-byte parts gives the panels of bf16.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashformer.quant.formats import COMPACT_HEAD_BYTES, EXCEPTION_BYTES, TILE_ROWS

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]

TABLE_SIZE = 16
STEP_COLS = 8  # columns of three lines
NO_INDEX = 255


def arrange_compact(codes: npt.NDArray[Any], heads: Bytes, blocks: Bytes) -> bool:
    """Write bfloat16 `codes` [tiles, 16, padded columns] into heads [tiles, head bytes] and blocks.

    False if a tile has more exceptions than its head has room for; heads and blocks are undefined.
    """
    bits = codes.view(np.uint16)
    keys = (bits >> 8).astype(np.intp)  # of the tile's upper bytes: tile x 256 + byte
    keys += np.arange(len(bits))[:, None, None] << 8
    tables = _tables(keys, len(bits))
    lookup = np.full((len(bits), 256), NO_INDEX, np.uint8)
    np.put_along_axis(lookup, tables.astype(np.intp), np.arange(TABLE_SIZE, dtype=np.uint8), axis=1)
    indices = np.take(lookup, keys)
    lower = bits.astype(np.uint8)
    where = np.nonzero(indices == NO_INDEX)
    if not _write_heads(heads, tables, where, bits[where]):
        return False
    indices[where] = 0  # the table's first is 0
    lower[where] = 0
    lines = _lines(blocks)
    first, second = _pairs(indices)
    np.copyto(lines[..., 0, :, :, :], first | second << 4)
    for half, pairs in enumerate(_pairs(lower)):
        np.copyto(lines[..., 1 + half, :, :, :], pairs)
    return True


def restore_compact(heads: Bytes, blocks: Bytes) -> npt.NDArray[Any]:
    """The inverse of `arrange_compact`: bfloat16 [tiles, 16, padded columns]."""
    shape = (len(blocks), TILE_ROWS, blocks.shape[1] * blocks.shape[2] // (3 * TILE_ROWS // 2))
    indices, lower = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    lines = _lines(blocks)
    first, second = _pairs(indices)
    np.copyto(first, lines[..., 0, :, :, :] & 0x0F0F)
    np.copyto(second, lines[..., 0, :, :, :] >> 4 & 0x0F0F)
    for half, pairs in enumerate(_pairs(lower)):
        np.copyto(pairs, lines[..., 1 + half, :, :, :])
    tables = heads[:, :TABLE_SIZE]
    upper = np.take_along_axis(tables, indices.reshape(len(heads), -1).astype(np.intp), axis=1)
    bits = upper.reshape(shape).astype(np.uint16)
    bits <<= 8
    bits |= lower
    ends = heads[:, TABLE_SIZE:COMPACT_HEAD_BYTES].copy().view(np.uint16)
    exceptions = heads[:, COMPACT_HEAD_BYTES:].copy().view(np.uint16).reshape(len(heads), -1, 2)
    for tile, row_ends in enumerate(ends):
        rows = np.repeat(np.arange(TILE_ROWS), np.diff(row_ends, prepend=np.uint16(0)))
        columns, values = exceptions[tile, : len(rows)].T
        bits[tile, rows, columns] = values
    return bits.view(ml_dtypes.bfloat16)


def _tables(keys: npt.NDArray[np.intp], num_tiles: int) -> Bytes:
    """Upper bytes of every tile's table [tiles, 16]: 0, then the most frequent, the lower first."""
    counts = np.bincount(keys.reshape(-1), minlength=num_tiles * 256).reshape(num_tiles, 256)
    counts[:, 0] = np.iinfo(counts.dtype).max
    return np.argsort(-counts, axis=1, kind="stable")[:, :TABLE_SIZE].astype(np.uint8)


def _write_heads(heads: Bytes, tables: Bytes, where: tuple[Any, ...], bits: Words) -> bool:
    tiles, rows, columns = where
    counts = np.zeros((len(heads), TILE_ROWS), np.int64)
    np.add.at(counts, (tiles, rows), 1)
    ends = counts.cumsum(axis=1)
    room = (heads.shape[1] - COMPACT_HEAD_BYTES) // EXCEPTION_BYTES
    if ends[:, -1].max() > room:
        return False
    exceptions = np.zeros((len(heads), room, 2), np.uint16)
    firsts = np.cumsum(ends[:, -1]) - ends[:, -1]
    exceptions[tiles, np.arange(len(tiles)) - firsts[tiles]] = np.stack([columns, bits], axis=1)
    heads[:, :TABLE_SIZE] = tables
    heads[:, TABLE_SIZE:COMPACT_HEAD_BYTES] = ends.astype(np.uint16).view(np.uint8)
    heads[:, COMPACT_HEAD_BYTES:] = exceptions.view(np.uint8).reshape(len(heads), -1)
    return True


def _lines(blocks: Bytes) -> Words:
    """View of the blocks as pairs of columns: [tiles, eights, lines, row groups, pairs, rows]."""
    tiles = len(blocks)
    return blocks.view(np.uint16).reshape(tiles, -1, 3, TILE_ROWS // 4, 2, 4)


def _pairs(values: Bytes) -> tuple[Words, Words]:
    """Views of bytes [tiles, 16, columns], each four columns of an eight, in the order of lines."""
    tiles, _, cols = values.shape
    pairs = values.view(np.uint16).reshape(tiles, TILE_ROWS // 4, 4, cols // STEP_COLS, 2, 2)
    by_line = pairs.transpose(0, 3, 4, 1, 5, 2)  # [tiles, eights, halves, groups, pairs, rows]
    return by_line[:, :, 0], by_line[:, :, 1]
