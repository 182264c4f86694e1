"""Random weights made in place, for measurements: a GPU draws a model of any size in a second.

Plan -> image; nothing is packed and nothing crosses the bus.
"""

import numpy as np
import torch

from flashformer.plan.plan import Matrix, Plan, Vector
from flashformer.quant.formats import TILE_ROWS

WEIGHT_STD = 0.02
# Standard deviation of the codes below, by bits of a code.
CODE_STD = {8: 73.3, 4: 4.61}  # of -127 .. 127 and of 0 .. 15, all equally likely
FP8_STD = 0.6  # of e4m3 whose exponent's upper bit is 0: below 2 and never NaN
INT4_ZERO = 8


def random_image(plan: Plan, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Weights of one size, norms of one, no biases, the true RoPE tables: uint8 [image_bytes]."""
    image = torch.zeros(plan.image_bytes, dtype=torch.uint8, device=device)
    random = torch.Generator(device).manual_seed(seed)
    for matrix in plan.matrices:
        tiles = image[matrix.offset : matrix.offset + matrix.nbytes]
        fill_tiles(tiles.view(matrix.num_tiles, matrix.tile_bytes), matrix, random)
    for vector in plan.vectors:
        values = image[vector.offset : vector.offset + 4 * vector.length].view(torch.float32)
        _fill_vector(values, vector, plan)
    return image


def fill_tiles(tiles: torch.Tensor, matrix: Matrix, random: torch.Generator) -> None:
    """Random codes in their valid range and equal scales, as quant/formats.py lays them out."""
    weight_format = matrix.weight_format
    if weight_format.scale == "none":
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[weight_format.name]
        tiles.view(dtype).normal_(0, WEIGHT_STD, generator=random)
        return
    num_blocks = weight_format.num_blocks(matrix.cols)
    split = num_blocks * weight_format.block_bytes
    blocks = tiles[:, :split].view(len(tiles), num_blocks, weight_format.block_bytes)
    codes = blocks[..., weight_format.block_scale_bytes :]
    if weight_format.name == "fp8":
        codes.random_(0, 256, generator=random).bitwise_and_(0xBF)
        scale = WEIGHT_STD / FP8_STD
    else:
        if weight_format.bits == 8:
            codes.view(torch.int8).random_(-127, 128, generator=random)
        else:
            codes.random_(0, 256, generator=random)
        scale = WEIGHT_STD / CODE_STD[weight_format.bits]
    if weight_format.scale == "row":
        tiles[:, split:].view(torch.float32).fill_(scale)
        return
    group_scales = 2 * TILE_ROWS
    blocks[..., :group_scales].view(torch.float16).fill_(scale)
    blocks[..., group_scales : weight_format.block_scale_bytes].fill_(INT4_ZERO)


def _fill_vector(values: torch.Tensor, vector: Vector, plan: Plan) -> None:
    if vector.name == "inv_freq":
        table = plan.spec.ropes[vector.layer].frequencies(plan.options.context)[0]
        values.copy_(torch.from_numpy(np.array(table)))
    else:
        values.fill_(0 if vector.name.endswith("bias") else 1)
