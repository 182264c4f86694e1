"""bfloat16 in 12 bits is the same bfloat16: stored, read back, multiplied; or it is not used."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flashformer.backends.base import StepBatch
from flashformer.backends.cpu import compile as cpu_compile
from flashformer.backends.cpu.backend import CpuBackend, open_cpu
from flashformer.backends.cpu.machine import AVX2, AVX512, cpu_flags, cpu_machine
from flashformer.backends.reference import reference_machine
from flashformer.codegen import cache
from flashformer.errors import PlanError
from flashformer.plan.pack import IncompressibleError, unpack, unpack_rows
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.compact import arrange_compact, restore_compact
from flashformer.quant.formats import COMPACT, FORMATS, TILE_ROWS, storage_format
from specs import SpecWeights, layer_spec, machine, model_spec, packed, plan_of

FORMAT = FORMATS[COMPACT]
BFLOAT16 = ml_dtypes.bfloat16
FINITE = [bits for bits in range(1 << 16) if bits & 0x7F80 != 0x7F80]


def stored(codes):
    """(fits, heads, blocks) of bfloat16 codes [tiles, 16, columns], over memory that was not 0."""
    tiles, _, cols = codes.shape
    heads = np.full((tiles, FORMAT.head_bytes(cols)), 0xA5, np.uint8)
    blocks = np.full((tiles, FORMAT.num_blocks(cols), FORMAT.block_bytes), 0xA5, np.uint8)
    return arrange_compact(codes, heads, blocks), heads, blocks


def room_of(cols):
    return (FORMAT.head_bytes(cols) - 48) // 4


def as_codes(bits):
    return np.asarray(bits, np.uint16).view(BFLOAT16)


def assert_same_bits(codes):
    fits, heads, blocks = stored(codes)
    assert fits
    assert restore_compact(heads, blocks).tobytes() == codes.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.uint16, st.tuples(st.integers(1, 3), st.just(16), st.sampled_from([16, 48, 96]))),
    st.integers(1, 256),
)
def test_any_bits_come_back_exactly_or_are_refused(bits, values):
    bits %= np.uint16(values << 8 & 0xFFFF or 0xFFFF)  # few upper bytes, or all of them
    fits, heads, blocks = stored(as_codes(bits))
    upper = [set(np.unique(tile >> 8)) | {0} for tile in bits]
    assert fits or max(len(found) for found in upper) > 16
    if fits:
        assert restore_compact(heads, blocks).tobytes() == bits.tobytes()


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1.0, 1e30])
def test_normal_weights_of_any_scale_fit(scale):
    random = np.random.default_rng(0)
    weights = random.standard_normal((8, TILE_ROWS, 2048)) * scale
    assert_same_bits(weights.astype(BFLOAT16))


def test_every_finite_bfloat16_is_kept_as_an_exception():
    bits = np.zeros((8, TILE_ROWS, 16 * 1024), np.uint16)
    per_tile = len(FINITE) // 128
    for start in range(0, len(FINITE), 8 * per_tile):  # they are few among zeros in every tile
        bits[:] = 0
        some = np.array(FINITE[start : start + 8 * per_tile], np.uint16)
        bits.reshape(8, -1)[:, :: 16 * 1024 * 16 // per_tile][:, :per_tile].flat[: len(some)] = some
        assert_same_bits(as_codes(bits))


@pytest.mark.parametrize("values", [[0], [0x8000], [1, 0x8001, 0x7F], [0x7F7F, 0xFF7F], [0x3F80]])
def test_zeros_denormals_and_the_largest_numbers_are_kept(values):
    bits = np.resize(np.array(values, np.uint16), (1, TILE_ROWS, 16))
    assert_same_bits(as_codes(bits))


def test_a_tile_takes_as_many_exceptions_as_it_has_room_for_and_not_one_more():
    bits = np.resize(np.arange(1, 16, dtype=np.uint16) << 8, (2, TILE_ROWS, 512))
    room = room_of(512)
    rare = np.arange(20, 20 + room + 1) << 8
    bits[1].reshape(-1)[7 :: bits[1].size // len(rare)][: len(rare)] = rare
    assert not stored(as_codes(bits))[0]
    bits[1, 0, 7] = 1 << 8
    assert_same_bits(as_codes(bits))


def test_a_plan_of_this_computer_stores_bf16_in_fewer_bytes_and_nothing_else_changes():
    spec = model_spec(hidden_size=2048)
    plain, compact = (plan_of(spec, compact=value) for value in (False, True))
    assert {m.format for m in plain.matrices} == {"bf16"}
    assert compact.matrix("qkv", 0).format == COMPACT
    assert compact.matrix("qkv", 0).nbytes < 0.76 * plain.matrix("qkv", 0).nbytes
    assert compact.image_key != plain.image_key
    for name in ("f16", "f32", "int8", "int4"):
        assert (
            plan_of(weight_format=name, compact=True).image_key
            == plan_of(weight_format=name, compact=False).image_key
        )
    assert cpu_machine().compact
    assert not reference_machine().compact


def test_bytes_of_a_step_do_not_count_the_room_for_exceptions():
    matrix = plan_of(model_spec(hidden_size=4096), compact=True).matrix("qkv", 0)
    assert matrix.read_bytes == matrix.num_tiles * (64 + TILE_ROWS * 4096 * 12 // 8)
    assert matrix.read_bytes < matrix.nbytes < 1.01 * matrix.read_bytes


def test_every_bf16_matrix_shrinks_whose_columns_an_exception_can_name():
    for cols in (1, 16, 48, 2048, 1 << 16):
        assert storage_format("bf16", cols) == COMPACT
        assert FORMAT.tile_bytes(cols) < FORMATS["bf16"].tile_bytes(cols)
    assert storage_format("bf16", (1 << 16) + 1) == "bf16"
    assert storage_format("f16", 4096) == "f16"


def test_only_the_panel_layout_holds_it():
    with pytest.raises(PlanError, match="bf16c exists in the panel layout only, not in rows"):
        plan_of(layout="rows", compact=True)


def test_an_image_holds_the_same_weights_as_a_plain_one():
    spec = model_spec(hidden_size=200)
    plans = [plan_of(spec, compact=value) for value in (False, True)]
    plain, compact = (packed(plan) for plan in plans)
    for before, after in zip(plans[0].matrices, plans[1].matrices, strict=True):
        assert np.array_equal(unpack(plans[0], plain, before), unpack(plans[1], compact, after))
    embedding = plans[1].matrix("embed_tokens")
    assert embedding.format == COMPACT
    rows = np.array([70, 0, 16])
    whole = unpack(plans[1], compact, embedding)
    assert np.array_equal(unpack_rows(plans[1], compact, embedding, rows), whole[rows])


# A hidden state of one 1 and zeros passes the layers unchanged (o_proj and down are 0) and the
# norm (its weights are 1 / sqrt(256)), so the logits are one column of the head.
COLUMNS = 256
SPEC = model_spec(
    hidden_size=COLUMNS,
    vocab_size=COLUMNS,
    rms_norm_eps=0.0,
    layers=(layer_spec(head_dim=16, intermediate_size=48),),
)
PATHS = {
    "avx512vnni": (AVX512 | {"avx512_vnni"}, ("-march=native",)),
    "avx512": (AVX512, ("-march=skylake-avx512",)),
    "avx2": (AVX2, ("-march=x86-64-v3",)),
    "scalar": (frozenset(), ("-DFLASHFORMER_SCALAR",)),
}


def transparent_weights(head):
    weights = SpecWeights(SPEC)
    weights.changed["embed_tokens", -1] = np.eye(COLUMNS).astype(BFLOAT16)
    weights.changed["norm", -1] = np.full(COLUMNS, 1 / 16, BFLOAT16)
    for role in ("o_proj", "down_proj"):
        weights.changed[role, 0] = np.zeros_like(weights.tensor(role, 0))
    weights.changed["lm_head", -1] = head
    return weights


def adversarial_head():
    """Normal numbers with exceptions of all kinds: huge, tiny, denormal, at corners of a tile."""
    random = np.random.default_rng(5)
    head = (random.standard_normal((COLUMNS, COLUMNS)) * 0.02).astype(BFLOAT16)
    bits = head.view(np.uint16)
    bits[0, 0], bits[15, 255], bits[16, 255], bits[31, 0] = 0x7F7F, 0xFF7F, 0x0001, 0x8001
    bits[100, 3:9] = [0x4800, 0xC900, 0x0080, 0x1234, 0x9234, 0x0000]
    return head


def step_over(columns):
    tokens = np.asarray(columns, np.int32)
    rows = len(tokens)
    slots = np.zeros(rows, np.int32)
    positions = np.arange(rows, dtype=np.int32)
    pages = np.arange(8, dtype=np.int32).reshape(1, 8)
    return StepBatch(tokens, positions, slots, pages, np.arange(rows, dtype=np.int32))


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path))
    flags = tuple("-O1" if flag == "-O3" else flag for flag in cpu_compile.FLAGS)
    monkeypatch.setattr(cpu_compile, "FLAGS", flags)


@pytest.mark.parametrize("arch", PATHS)
def test_logits_of_one_hot_rows_are_the_columns_of_the_head(private_cache, monkeypatch, arch):
    needs, flags = PATHS[arch]
    if not needs <= cpu_flags():
        pytest.skip(f"this processor has no {arch}")
    monkeypatch.setitem(cpu_compile.TARGET_FLAGS, arch, flags)
    head = adversarial_head()
    plan = make_plan(SPEC, replace(cpu_machine(2), arch=arch), PlanOptions(context=128))
    assert plan.matrix("lm_head").format == COMPACT
    backend = CpuBackend(plan, packed(plan, transparent_weights(head)), 8)
    expected = head.astype(np.float32).T
    for rows in (1, 2, 8, 100):
        for first in range(0, COLUMNS, rows if rows > 8 else 64):
            columns = np.arange(first, min(first + rows, COLUMNS))
            assert np.array_equal(backend.step(step_over(columns)).logits, expected[columns])
    backend.close()


def wild(shape, seed):
    """Any finite bits: nothing that a table of 16 could hold."""
    return as_codes(np.random.default_rng(seed).choice(FINITE, shape).astype(np.uint16))


def test_matrices_that_do_not_fit_are_named_all_at_once():
    spec = model_spec(hidden_size=200)
    weights = SpecWeights(spec)
    weights.changed["lm_head", -1] = wild((71, 200), 1)
    weights.changed["up_proj", 1] = wild((44, 200), 2)
    with pytest.raises(IncompressibleError) as caught:
        packed(plan_of(spec, compact=True), weights)
    assert caught.value.matrices == (("gate_up", 1), ("lm_head", -1))


def test_a_model_with_wild_weights_runs_with_those_plain_and_is_tried_once(
    private_cache, monkeypatch
):
    head = wild((COLUMNS, COLUMNS), 3)
    head[np.abs(head.astype(np.float32)) > 1e30] = 1  # 0 x w stays finite in float32
    weights = transparent_weights(head)
    packings = []
    pack = cache.pack

    def counted(*arguments):
        packings.append(arguments)
        pack(*arguments)

    monkeypatch.setattr(cache, "pack", counted)
    for _ in range(2):
        backend = open_cpu(SPEC, weights, PlanOptions(context=128), 8, 2, None)
        formats = {m.name: m.format for m in backend.plan.matrices}
        assert formats["lm_head"] == "bf16"
        assert formats["embed_tokens"] == formats["qkv"] == COMPACT
        columns = np.array([0, 17, 255])
        logits = backend.step(step_over(columns)).logits
        assert np.array_equal(logits, head.astype(np.float32).T[columns])
        backend.close()
    assert len(packings) == 2  # the attempt and the plain one, both in the first round


def test_a_damaged_record_of_what_does_not_fit_costs_a_packing(private_cache):
    weights = transparent_weights(wild((COLUMNS, COLUMNS), 3))
    plan = make_plan(SPEC, machine(compact=True), PlanOptions(context=128))
    for _ in range(2):
        with pytest.raises(IncompressibleError, match="lm_head"):
            cache.load_image(plan, weights)
    (record,) = [e.path for e in cache.entries() if e.path.suffix == cache.VERDICT_SUFFIX]
    record.write_text("[[")
    with pytest.raises(IncompressibleError):
        cache.load_image(plan, weights)
    assert record.read_text() == '[["lm_head", -1]]'
