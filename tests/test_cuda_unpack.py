"""A format's tiles mean the same to numpy, to torch and to the GPU's lanes: bit by bit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashformer.plan.pack import unpack_tiles
from flashformer.quant.formats import FORMATS as TABLE
from flashformer.quant.formats import TILE_ROWS
from flashformer.quant.layout import arrange
from specs import LAYOUT_FORMATS, SpecWeights, layer_spec, model_spec, packed, plan_of

torch = pytest.importorskip("torch")

FORMATS = LAYOUT_FORMATS["fragment"]


def image_of(name, hidden, inner):
    spec = model_spec((layer_spec(intermediate_size=inner),), hidden_size=hidden)
    plan = plan_of(spec, name, layout="fragment", page_tokens=16)
    return plan, packed(plan, SpecWeights(spec, np.float32))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=8, deadline=None)
@given(hidden=st.integers(16, 300), inner=st.integers(1, 200))
def test_torch_unpacks_what_numpy_says_rounded_once(name, hidden, inner):
    from flashformer.backends.cuda.unpack import dtype_of, padded_cols, unpack

    plan, image = image_of(name, hidden, inner)
    for matrix in plan.matrices:
        weight_format = matrix.weight_format
        expected = unpack_tiles(plan, image, matrix, 0, matrix.num_tiles)
        tiles = torch.from_numpy(image[matrix.offset :][: matrix.nbytes].copy())
        shape = (len(expected), padded_cols(weight_format, matrix.cols))
        out = torch.empty(shape, dtype=dtype_of(weight_format))
        unpack(tiles.view(matrix.num_tiles, -1), weight_format, out)

        stored = np.float16 if name == "f16" else ml_dtypes.bfloat16
        rounded = expected.astype(stored).astype(np.float32)
        assert np.array_equal(out.float().numpy()[:, : matrix.cols], rounded)
        assert not out[:, matrix.cols :].any()


def lane_words(block, bits, step):
    """A step's operand A of the lanes, u32 [32, 4], as kernel/multiply.cuh expands the codes."""
    if bits == 8:
        return block.view("<u4").reshape(-1, 32, 4)[step]
    together = min(2, len(block) // 256)  # steps that a lane holds side by side
    words = block.view("<u4").reshape(-1, 32, together, 2)[step // together, :, step % together]
    mask = np.uint32(0xF0F0F0F0)
    return np.concatenate([words << np.uint32(4) & mask, words & mask], axis=1)


def product(a, x):
    """mma.m16n8k32 of signed bytes (PTX ISA 9.7.14.5): operand A by lanes, B's columns natural."""
    found = np.zeros((TILE_ROWS, 1), np.int64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for word in range(4):  # rows g, g + 8, g, g + 8; the lane's first, then its last columns
            values = a[lane, word : word + 1].view(np.int8).astype(np.int64)
            first = 8 * t + 4 * (word // 2)  # of a lane's eight neighbours: its two words of B
            found[g + 8 * (word % 2), 0] += values @ x[first : first + 4]
    return found[:, 0]


@pytest.mark.parametrize("name", [n for n in FORMATS if not TABLE[n].floating])
def test_lanes_multiply_codes_by_their_own_columns(name):
    weight_format, random = TABLE[name], np.random.default_rng(5)
    cols, bits = weight_format.block_cols, weight_format.bits
    low, high, dtype = (-127, 128, np.int8) if bits == 8 else (0, 16, np.uint8)
    codes = random.integers(low, high, (1, TILE_ROWS, cols)).astype(dtype)
    out = np.zeros((1, 1, TILE_ROWS * cols * bits // 8), np.uint8)
    arrange(codes, weight_format, "fragment", out)
    x = random.integers(-(2**14), 2**14, cols)

    found = sum(
        product(lane_words(out[0, 0], bits, step), x[32 * step : 32 * step + 32])
        for step in range(cols // 32)
    )

    meaning = codes[0].astype(np.int64) if bits == 8 else (codes[0].astype(np.int64) - 8) * 16
    assert np.array_equal(found, meaning @ x)
