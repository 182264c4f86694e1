"""Codes and scales -> float32 matrix: the meaning of every format, which all kernels must match."""

import numpy as np

from flashformer.quant.encode import INT4_ZERO, Encoded, Float32
from flashformer.quant.formats import Format


def decode(encoded: Encoded, weight_format: Format) -> Float32:
    """The weights [rows, cols] that `encoded` stands for: code x scale, exact in float32.

    none: the code itself. row: code x scale[row]. group: (code - zero) x scale[row, column //
    group], where zero is 8 or zeros[row, column // group].
    """
    codes, scales, zeros = encoded
    if scales is None:
        return np.asarray(codes, dtype=np.float32)
    values: Float32 = codes.astype(np.float32)
    if weight_format.scale == "row":
        values *= scales[:, None]
        return values
    columns = np.arange(codes.shape[1]) // weight_format.block_cols
    values -= np.float32(INT4_ZERO) if zeros is None else zeros.astype(np.float32)[:, columns]
    values *= scales.astype(np.float32)[:, columns]
    return values
