"""The order of the codes inside a block: one pair of functions a layout.

codes [tiles, 16, cols] <-> bytes [tiles, blocks, code bytes of a block], for `Machine.layout`:

rows      row 0's codes, then row 1's ...; int4: two codes a byte, the even column in the low half.
panel     (CPU: a vector holds the 16 rows)
          f32, f16: [column][16 rows]; bf16, int8: [column pair][16 rows][2 columns];
          int4: for each 8 columns [16 rows][4 bytes]: the low halves hold columns 0, 4, 1, 5, the
          high halves 2, 6, 3, 7, so that a mask leaves neighbours in a 32-bit word's two halves.
fragment  (CUDA: a warp's A operand of mma.m16n8k16, PTX ISA section 9.7.14)
          32 lanes x 4 words; with g = lane // 4, t = lane % 4 a lane's words are rows g, g + 8, g,
          g + 8 at columns nt, nt, nt + n/2, nt + n/2, n/2 neighbouring columns each: n = 4 in the
          16-bit formats, 8 in the 8-bit ones. The instruction numbers the columns otherwise; in
          this order a lane's part of operand B is n neighbouring elements, so that activations
          keep their natural order. fp8: the bytes of a word are columns 0, 2, 1, 3, so that masks
          leave neighbours in a word's two halves.
          int4: a word is 8 columns of a row, 0 to 3 in the low halves of its bytes, 4 to 7 in the
          high ones; a lane's words are rows g, g + 8 at columns 8t of 32, then the same of the next
          32 (not in groups of 32, whose lanes have two words). The code's upper bit is flipped:
          half bytes are numbers from -8 to 7. Scales and zero-points: rows 0, 8, 1, 9 ...
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from flashformer.errors import PlanError, UsageError
from flashformer.quant.encode import CODE_DTYPES
from flashformer.quant.formats import QUANTS, TILE_ROWS, Format

Bytes = npt.NDArray[np.uint8]
LAYOUTS = ("rows", "panel", "fragment")
PANEL_FORMATS = ("f32", "bf16", "bf16c", "f16", "int8", "int4", "int4g128")
FP8_BYTES = [0, 2, 1, 3]  # of four neighbouring columns, in the fragment layout; its own inverse
INT4_SIGNS = 0x88  # of the two codes of a byte


def check_layout(weight_format: Format, layout: str) -> None:
    """Raise `UsageError` if `layout` cannot hold `weight_format`, `PlanError` if there is none."""
    if layout not in LAYOUTS:
        raise PlanError(f"Layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}.")
    if layout == "fragment" and weight_format.bits > 16:
        raise UsageError(
            f"A GPU multiplies formats of at most 16 bits, not {weight_format.name}; "
            "choose bf16 or f16."
        )
    if layout == "panel" and weight_format.name not in PANEL_FORMATS:
        known = ", ".join(quants_of(layout))
        raise UsageError(
            f"The CPU kernel cannot multiply {weight_format.name}; choose one of {known}, or run "
            "it with --device cuda."
        )


def quants_of(layout: str) -> tuple[str, ...]:
    """The formats with scales that `layout` can hold."""
    return tuple(name for name in QUANTS if layout != "panel" or name in PANEL_FORMATS)


def scale_rows(layout: str) -> npt.NDArray[np.intp]:
    """The rows of a tile in the order in which a block holds their scales."""
    rows = np.arange(TILE_ROWS)
    return rows.reshape(2, -1).T.ravel() if layout == "fragment" else rows


def arrange(codes: npt.NDArray[Any], weight_format: Format, layout: str, out: Bytes) -> None:
    """Write `codes` [tiles, 16, padded columns] into `out` [tiles, blocks, block code bytes]."""
    if weight_format.bits == 4:
        _arrange_halves(codes, layout, out)
        return
    if layout == "fragment" and weight_format.name == "fp8":
        codes = _swap_middle(codes)
    units = _as_units(codes, weight_format, layout)
    target = out.view(units.dtype)
    np.copyto(_as_logical(target, layout), _split(units, out.shape[1], layout))


def restore(stored: Bytes, weight_format: Format, layout: str) -> npt.NDArray[Any]:
    """The inverse of `arrange`: codes [tiles, 16, padded columns] from `stored`."""
    tiles, blocks, _ = stored.shape
    cols = blocks * weight_format.block_cols
    codes = np.empty((tiles, TILE_ROWS, cols), dtype=CODE_DTYPES[weight_format.name])
    if weight_format.bits == 4:
        _restore_halves(stored, layout, codes)
        return codes
    units = _as_units(codes, weight_format, layout)
    np.copyto(_split(units, blocks, layout), _as_logical(stored.view(units.dtype), layout))
    if layout == "fragment" and weight_format.name == "fp8":
        codes = _swap_middle(codes)
    return codes


def _swap_middle(codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The second and third of every four columns change places."""
    fours = codes.reshape(*codes.shape[:2], -1, 4)
    return np.ascontiguousarray(fours[..., FP8_BYTES]).reshape(codes.shape)


def _as_units(codes: npt.NDArray[Any], weight_format: Format, layout: str) -> npt.NDArray[Any]:
    """Codes as the units that move together: one code, a pair of columns, or a 32-bit word."""
    if layout == "fragment":
        return codes.view("u4")
    single = layout == "rows" or weight_format.name == "f16"
    pair = not single and weight_format.bits < 32
    return codes.view(f"u{weight_format.bits // 8 * (2 if pair else 1)}")


def _split(units: npt.NDArray[Any], blocks: int, layout: str) -> npt.NDArray[Any]:
    """View [tiles, 16, units] with the axes of `_as_logical`."""
    tiles, rows, total = units.shape
    width = total // blocks
    if layout == "fragment":
        return units.reshape(tiles, 2, rows // 2, blocks, width // 2, 2)
    return units.reshape(tiles, rows, blocks, width)


def _as_logical(target: npt.NDArray[Any], layout: str) -> npt.NDArray[Any]:
    """View stored units [tiles, blocks, units] in the axis order of `_split`."""
    tiles, blocks, total = target.shape
    width = total // TILE_ROWS
    if layout == "rows":
        return target.reshape(tiles, blocks, TILE_ROWS, width).transpose(0, 2, 1, 3)
    if layout == "panel":
        return target.reshape(tiles, blocks, width, TILE_ROWS).transpose(0, 3, 1, 2)
    lanes = target.reshape(
        tiles, blocks, TILE_ROWS // 2, width // 2, 2, 2
    )  # g, t, column half, row half
    return lanes.transpose(0, 5, 2, 1, 3, 4)


def _halves(codes: npt.NDArray[Any], blocks: int, layout: str) -> tuple[Any, Any]:
    """Views [tiles, 16, blocks, ...] of the codes that go into low and high halves of the bytes."""
    tiles, rows, cols = codes.shape
    if layout == "rows":
        by_byte = codes.reshape(tiles, rows, blocks, cols // blocks // 2, 2)
        return by_byte[..., 0], by_byte[..., 1]
    if layout == "fragment":
        steps = min(2, cols // blocks // 32)  # of 32 columns, that a lane holds together
        by_lane = codes.reshape(tiles, 2, rows // 2, blocks, -1, steps, 4, 2, 4)
        return by_lane[..., 0, :], by_lane[..., 1, :]
    by_eight = codes.reshape(tiles, rows, blocks, cols // blocks // 8, 2, 2, 2)
    return by_eight[..., 0, :].swapaxes(-1, -2), by_eight[..., 1, :].swapaxes(-1, -2)


def _bytes_logical(stored: Bytes, layout: str) -> Bytes:
    """View stored int4 bytes in the axis order of `_halves`."""
    tiles, blocks, total = stored.shape
    if layout == "rows":
        return stored.reshape(tiles, blocks, TILE_ROWS, -1).transpose(0, 2, 1, 3)
    if layout == "fragment":
        steps = min(2, total // (TILE_ROWS * 16))
        # load, g, t, step, half of the rows, byte
        lanes = stored.reshape(tiles, blocks, -1, TILE_ROWS // 2, 4, steps, 2, 4)
        return lanes.transpose(0, 6, 3, 1, 2, 5, 4, 7)
    eights = total // (TILE_ROWS * 4)
    return stored.reshape(tiles, blocks, eights, TILE_ROWS, 2, 2).transpose(0, 3, 1, 2, 4, 5)


def _arrange_halves(codes: npt.NDArray[Any], layout: str, out: Bytes) -> None:
    low, high = _halves(codes, out.shape[1], layout)
    np.copyto(_bytes_logical(out, layout), (low | high << 4) ^ _signs(layout))


def _restore_halves(stored: Bytes, layout: str, codes: npt.NDArray[Any]) -> None:
    low, high = _halves(codes, stored.shape[1], layout)
    packed = _bytes_logical(stored, layout) ^ _signs(layout)
    low[...] = packed & 15
    high[...] = packed >> 4


def _signs(layout: str) -> np.uint8:
    return np.uint8(INT4_SIGNS if layout == "fragment" else 0)
