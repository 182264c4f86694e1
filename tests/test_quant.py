"""Formats mean what they say: codes, scales and their order in memory."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flashformer.errors import PlanError, UsageError
from flashformer.quant.decode import decode
from flashformer.quant.encode import CODE_DTYPES, encode, widen
from flashformer.quant.formats import CHOICES, FORMATS, TILE_ROWS
from flashformer.quant.layout import arrange, check_layout, restore
from specs import PACKINGS

GROUPED = ("int4", "int4g64", "int4g128")
SPANNED = ("int4z", "int4g64z", "int4g128z")  # with zero-points
# Weights of any checkpoint, its subnormals included; float16 scales end at 65504.
floats = st.floats(-60000, 60000, width=32, allow_nan=False)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 300)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=floats)
)


def round_trip(matrix, name):
    return decode(encode(matrix, FORMATS[name]), FORMATS[name])


def random_codes(name, tiles, cols, seed=0):
    random = np.random.default_rng(seed)
    dtype = np.dtype(CODE_DTYPES[name])
    if FORMATS[name].bits == 4:
        return random.integers(0, 16, (tiles, TILE_ROWS, cols), np.uint8)
    raw = random.integers(0, 256, (tiles, TILE_ROWS, cols * dtype.itemsize), np.uint8)
    return raw.view(dtype)


def arranged(codes, name, layout):
    tiles, _, cols = codes.shape
    blocks = cols // FORMATS[name].block_cols
    code_bytes = FORMATS[name].block_bytes - FORMATS[name].block_scale_bytes
    out = np.zeros((tiles, blocks, code_bytes), np.uint8)
    arrange(codes, FORMATS[name], layout, out)
    return out


@pytest.mark.parametrize("name", ["f32", "bf16", "f16"])
def test_a_float_format_keeps_its_own_numbers_exactly(name):
    matrix = np.random.default_rng(0).standard_normal((7, 65)).astype(CODE_DTYPES[name])
    assert np.array_equal(round_trip(matrix, name), matrix.astype(np.float32))


def test_bfloat16_widens_to_the_same_number_for_every_bit_pattern():
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    assert np.array_equal(widen(every), every.astype(np.float32), equal_nan=True)


@given(matrices)
def test_int8_is_at_most_half_a_step_away(matrix):
    encoded = encode(matrix, FORMATS["int8"])
    scales = encoded.scales
    error = np.abs(decode(encoded, FORMATS["int8"]) - matrix)
    # A product and a quotient in float32 round by 2^-24 of at most 127 steps each; where the scale
    # is subnormal it may itself be half of the smallest float away from absmax / 127.
    smallest = np.finfo(np.float32).smallest_subnormal
    bound = scales * np.float32(0.5 + 2**-15) + 64 * smallest
    assert (error <= bound[:, None]).all()


@given(matrices)
def test_int8_maps_the_largest_magnitude_of_a_row_to_127(matrix):
    codes = encode(matrix, FORMATS["int8"]).codes
    largest = np.abs(matrix).max(axis=1)
    normal = largest > 1e-30
    assert (np.abs(codes).max(axis=1)[normal] == 127).all()
    assert codes.min() >= -127


@pytest.mark.parametrize("name", GROUPED)
@given(matrix=matrices)
def test_int4_picks_the_nearest_code_for_the_scale_that_is_stored(name, matrix):
    weight_format = FORMATS[name]
    codes, scales, _ = encode(matrix, weight_format)
    assert scales.dtype == np.float16
    steps = scales.astype(np.float64)[:, np.arange(matrix.shape[1]) // weight_format.block_cols]
    every = (np.arange(16) - 8) * steps[..., None]
    best = np.abs(every - matrix[..., None]).min(axis=-1)
    error = np.abs((codes.astype(np.float64) - 8) * steps - matrix)
    # A tie may fall to either side after the quotient was rounded to float32.
    assert (error <= best + np.abs(steps) * 2**-19).all()


@pytest.mark.parametrize("name", GROUPED)
def test_int4_keeps_the_largest_weight_of_a_group_to_the_precision_of_its_scale(name):
    matrix = np.random.default_rng(1).standard_normal((9, 256)).astype(np.float32)
    groups = matrix.reshape(9, -1, FORMATS[name].block_cols)
    at = np.abs(groups).argmax(axis=2, keepdims=True)
    largest = np.take_along_axis(groups, at, 2)
    kept = np.take_along_axis(round_trip(matrix, name).reshape(groups.shape), at, 2)
    assert np.abs(kept / largest - 1).max() <= 2**-11  # half a unit of a float16's 11 bits


@pytest.mark.parametrize("name", ["int8", *GROUPED])
def test_zeros_stay_zeros(name):
    matrix = np.zeros((3, 160), np.float32)
    matrix[1, 3] = 5.0
    result = round_trip(matrix, name)
    assert not result[0].any()
    assert np.count_nonzero(result[1]) == 1


@pytest.mark.parametrize("name", ["int8", *GROUPED])
def test_weights_that_are_too_small_for_a_scale_become_zero(name):
    matrix = np.full((2, 128), np.finfo(np.float32).smallest_subnormal, np.float32)
    assert np.isfinite(round_trip(matrix, name)).all()
    assert np.abs(round_trip(matrix, name)).max() <= matrix.max()


@pytest.mark.parametrize("name", GROUPED)
def test_a_short_last_group_is_encoded_like_one_that_is_padded_with_zeros(name):
    matrix = np.random.default_rng(2).standard_normal((4, 150)).astype(np.float32)
    padded = np.pad(matrix, ((0, 0), (0, -150 % FORMATS[name].block_cols)))
    short, full = encode(matrix, FORMATS[name]), encode(padded, FORMATS[name])
    assert np.array_equal(short.codes, full.codes[:, :150])
    assert np.array_equal(short.scales, full.scales)


@pytest.mark.parametrize(("layout", "name"), PACKINGS)
def test_restoring_an_arranged_block_gives_its_codes_back(layout, name):
    codes = random_codes(name, 3, 2 * FORMATS[name].block_cols)
    stored = arranged(codes, name, layout)
    assert restore(stored, FORMATS[name], layout).tobytes() == codes.tobytes()


@pytest.mark.parametrize("name", SPANNED)
@given(matrix=matrices)
def test_zero_points_keep_every_weight_within_a_step_of_its_group(name, matrix):
    encoded = encode(matrix, FORMATS[name])
    steps = encoded.scales.astype(np.float64)
    steps = steps[:, np.arange(matrix.shape[1]) // FORMATS[name].block_cols]
    error = np.abs(decode(encoded, FORMATS[name]) - matrix.astype(np.float64))
    # Half a step for the code and half for the zero-point. A scale rounded down by 2^-11 leaves up
    # to 15 * 2^-11 steps beyond the last code; below the smallest float16 all is zero or one step.
    bound = steps * (1 + 15 * 2**-11 + 2**-15) + 15 * 2**-25 + np.abs(matrix) * (steps == 0)
    assert (error <= bound).all()


@given(matrix=matrices)
def test_fp8_is_at_most_half_a_spacing_away(matrix):
    encoded = encode(matrix, FORMATS["fp8"])
    error = np.abs(decode(encoded, FORMATS["fp8"]) - matrix.astype(np.float64))
    # 3 bits behind the point: 2^-4 of the number; below 2^-6 steps of 2^-9. Scale and quotient
    # round.
    scales = encoded.scales.astype(np.float64)[:, None]
    tiny = 448 * np.finfo(np.float32).smallest_subnormal
    assert (
        error <= np.abs(matrix) * (2**-4 + 2**-22) + scales * 2**-10 * (1 + 2**-20) + tiny
    ).all()


@settings(max_examples=20)
@given(st.sampled_from(list(CHOICES)), st.integers(1, 500))
def test_a_tile_has_room_for_its_codes_and_scales_and_nothing_else(name, cols):
    weight_format = FORMATS[name]
    padded = -(-cols // weight_format.block_cols) * weight_format.block_cols
    codes = TILE_ROWS * padded * weight_format.bits // 8
    group_bytes = 3 if weight_format.zeros else 2
    per_row = {"none": 0, "row": 4, "group": group_bytes * (padded // weight_format.block_cols)}
    assert weight_format.tile_bytes(cols) == codes + TILE_ROWS * per_row[weight_format.scale]


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_panel_holds_pairs_of_columns_side_by_side_for_16_rows(name):
    cols = FORMATS[name].block_cols
    codes = random_codes(name, 1, cols)
    stored = arranged(codes, name, "panel").view(codes.dtype).reshape(cols // 2, TILE_ROWS, 2)
    for column in range(cols):
        expected = codes[0, :, column]
        assert stored[column // 2, :, column % 2].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_a_panel_holds_single_columns_of_16_rows(name):
    codes = random_codes(name, 1, 16)
    stored = arranged(codes, name, "panel").view(codes.dtype).reshape(16, TILE_ROWS)
    assert stored.tobytes() == np.ascontiguousarray(codes[0].T).tobytes()


@pytest.mark.parametrize("name", GROUPED)
def test_a_panel_of_int4_leaves_neighbouring_columns_in_the_halves_of_a_word(name):
    cols = FORMATS[name].block_cols
    codes = random_codes(name, 1, cols)
    stored = arranged(codes, name, "panel").reshape(cols // 8, TILE_ROWS, 4)
    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    for eight in range(cols // 8):
        for byte in range(4):
            value = stored[eight, :, byte]
            assert np.array_equal(value & 15, codes[0, :, 8 * eight + low[byte]])
            assert np.array_equal(value >> 4, codes[0, :, 8 * eight + high[byte]])


def test_a_fragment_holds_the_a_operand_of_each_lane_in_16_bytes():
    codes = random_codes("bf16", 1, 16)
    stored = arranged(codes, "bf16", "fragment").view(np.uint16).reshape(32, 4, 2)
    raw = codes.view(np.uint16)[0]
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for word, (row, column) in enumerate([(0, 0), (8, 0), (0, 2), (8, 2)]):
            at = 4 * thread + column
            assert np.array_equal(stored[lane, word], raw[group + row, at : at + 2])


@pytest.mark.parametrize(
    ("layout", "name", "word"),
    [
        ("fragment", "f32", "16 bits"),
        ("panel", "fp8", "choose one of int8, int4, int4g128, or run it with --device cuda"),
        ("panel", "int4g64z", "--device cuda"),
    ],
)
def test_a_layout_that_cannot_hold_a_format_is_refused(layout, name, word):
    with pytest.raises(UsageError, match=word):
        check_layout(FORMATS[name], layout)


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(PlanError, match="unknown"):
        check_layout(FORMATS["bf16"], "spiral")
