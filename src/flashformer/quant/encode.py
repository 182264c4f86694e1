"""Float matrix -> codes and scales: how weights are quantised.

`encode(matrix, format)` -> `Encoded`; `decode.decode` is its inverse.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flashformer.quant.formats import FORMATS, Format

Float32 = npt.NDArray[np.float32]

# The number type of a float format's codes, and of an integer format's codes in memory.
CODE_DTYPES: dict[str, npt.DTypeLike] = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "bf16c": ml_dtypes.bfloat16,
    "f16": np.float16,
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
    **{name: np.uint8 for name, f in FORMATS.items() if f.bits == 4},
}
INT8_MAX = 127
FP8_MAX = 448
INT4_MAX = 15
INT4_ZERO = 8  # the code that means 0


class Encoded(NamedTuple):
    """Codes, scales and zero-points of a matrix."""

    codes: npt.NDArray[Any]  # [rows, cols], dtype as in CODE_DTYPES
    scales: (
        npt.NDArray[Any] | None
    )  # row: float32 [rows]; group: float16 [rows, groups]; none: None
    zeros: npt.NDArray[np.uint8] | None = None  # [rows, groups] if the format has them


def encode(matrix: npt.NDArray[Any], weight_format: Format) -> Encoded:
    """Quantise `matrix` [rows, cols] (any float type) row by row.

    Float formats round to nearest, ties to even. int8 maps the absolute maximum of a row to 127,
    fp8 to 448. int4 maps the value of a group with the largest magnitude to code 0 (-8), with its
    sign in the scale, and rounds the scale to float16 before the codes are computed, so that the
    codes are the nearest ones to the scale that the kernel will use. With zero-points, codes 0 to
    15 span a group's range, which is made to hold 0. The last group may be short.
    """
    if not weight_format.quantised:
        return Encoded(_as_float(matrix, weight_format), None)
    values = widen(matrix)
    if weight_format.name == "fp8":
        return _encode_fp8(values)
    if weight_format.scale == "row":
        return _encode_rows(values)
    if weight_format.zeros:
        return _encode_spans(values, weight_format.block_cols)
    return _encode_groups(values, weight_format.block_cols)


def widen(matrix: npt.NDArray[Any]) -> Float32:
    """`matrix` as float32, exact; a copy unless it is float32 already."""
    if matrix.dtype != ml_dtypes.bfloat16:
        return np.asarray(matrix, dtype=np.float32)
    # A bfloat16 is the upper half of a float32. Shifting is faster than ml_dtypes' cast, which also
    # keeps the interpreter's lock.
    bits = matrix.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _as_float(matrix: npt.NDArray[Any], weight_format: Format) -> npt.NDArray[Any]:
    dtype = np.dtype(CODE_DTYPES[weight_format.name])
    with np.errstate(over="ignore"):  # the packer refuses what became infinite, by name
        return matrix if matrix.dtype == dtype else widen(matrix).astype(dtype)


def _scaled_rows(values: Float32, most: int) -> tuple[Float32, Float32]:
    """Rows divided by their scales, at most `most`, and the scales."""
    largest = np.maximum(values.max(axis=1), -values.min(axis=1))
    scales = (largest / np.float32(most)).astype(np.float32)
    divisor = np.where(scales > 0, scales, np.float32(1))[:, None]
    return np.asarray(values / divisor, np.float32), scales


def _encode_fp8(values: Float32) -> Encoded:
    scaled, scales = _scaled_rows(values, FP8_MAX)
    np.clip(scaled, -FP8_MAX, FP8_MAX, out=scaled)  # beyond lies no number
    return Encoded(scaled.astype(ml_dtypes.float8_e4m3fn), scales)


def _encode_rows(values: Float32) -> Encoded:
    codes, scales = _scaled_rows(values, INT8_MAX)
    np.rint(codes, out=codes)
    # A subnormal scale is too coarse to hold absmax / 127: unclipped codes would leave the range.
    np.clip(codes, -INT8_MAX, INT8_MAX, out=codes)
    return Encoded(codes.astype(np.int8), scales)


def _grouped(values: Float32, group: int) -> Float32:
    """[rows, groups, group], the last group padded with zeros."""
    short = -values.shape[1] % group
    if short:
        values = np.pad(values, ((0, 0), (0, short)))
    return values.reshape(len(values), -1, group)


def _encode_spans(values: Float32, group: int) -> Encoded:
    groups = _grouped(values, group)
    highest = np.maximum(groups.max(axis=2), np.float32(0))
    lowest = np.minimum(groups.min(axis=2), np.float32(0))
    with np.errstate(over="ignore"):  # an infinite scale is refused by the packer, by name
        scales = ((highest - lowest) / np.float32(INT4_MAX)).astype(np.float16)
    divisor = scales.astype(np.float32)
    divisor[divisor == 0] = 1
    zeros = np.clip(np.rint(-lowest / divisor), 0, INT4_MAX)
    codes = groups / divisor[:, :, None]
    np.rint(codes, out=codes)
    codes += zeros[:, :, None]
    np.clip(codes, 0, INT4_MAX, out=codes)
    flat = codes.astype(np.uint8).reshape(len(values), -1)
    return Encoded(flat[:, : values.shape[1]], scales, zeros.astype(np.uint8))


def _encode_groups(values: Float32, group: int) -> Encoded:
    rows, cols = values.shape
    groups = _grouped(values, group)
    highest, lowest = groups.max(axis=2), groups.min(axis=2)
    signed = np.where(highest > -lowest, highest, lowest)
    with np.errstate(over="ignore"):  # an infinite scale is refused by the packer, by name
        scales = (signed / np.float32(-INT4_ZERO)).astype(np.float16)
    divisor = scales.astype(np.float32)
    divisor[divisor == 0] = 1
    codes = groups / divisor[:, :, None]
    np.rint(codes, out=codes)
    codes += np.float32(INT4_ZERO)
    np.clip(codes, 0, INT4_MAX, out=codes)
    return Encoded(codes.astype(np.uint8).reshape(rows, -1)[:, :cols], scales)
