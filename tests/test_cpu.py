"""The CPU backend computes what the reference computes, stage by stage, always with equal bits."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashformer.backends.base import StepBatch
from flashformer.backends.cpu import compile as cpu_compile
from flashformer.backends.cpu.backend import CpuBackend
from flashformer.backends.cpu.compile import compile_kernel
from flashformer.backends.cpu.machine import AVX2, AVX512, cpu_flags, cpu_machine
from flashformer.backends.reference import STAGES, ReferenceBackend
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import FORMATS
from specs import SpecWeights, layer_spec, layer_specs, model_spec, packed

BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
# Together: every bias, QK-norm, windows shorter and longer than a chunk, partial rotary, a layer
# without positions, groups of 1, 2, 3 and 6 heads, heads that are not whole tiles, odd widths.
SPEC = model_spec(
    hidden_size=203,
    vocab_size=517,
    max_position_embeddings=1024,
    layers=(
        layer_spec(**BIASES, qk_norm=True, head_dim=20, intermediate_size=301),
        layer_spec(window=5, num_q_heads=3, num_kv_heads=1, head_dim=64),
        layer_spec(rope_idx=-1, num_q_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=9),
        layer_spec(window=300, num_q_heads=6, num_kv_heads=1, head_dim=12),
    ),
)
WEIGHTS = SpecWeights(SPEC)
# Of the layers and of the head: every format in each place.
FORMAT_PAIRS = [
    ("f32", "int4"),
    ("bf16", "f16"),
    ("f16", "int4g128"),
    ("int8", "bf16"),
    ("int4", "int8"),
    ("int4g128", "f32"),
]
# Instruction sets that may not be this processor's best: what they need, how they are compiled.
PATHS = {
    "scalar": (frozenset(), ("-DFLASHFORMER_SCALAR",)),
    "avx2": (AVX2, ("-march=x86-64-v3",)),
    "avx512": (AVX512, ("-march=skylake-avx512",)),
}
CONTEXT = 1024
PAGES_PER_SLOT = CONTEXT // 32
NUM_PAGES = 8 * PAGES_PER_SLOT
LENGTH = 600  # three chunks of attention

# Of the largest number of a stage's output, given the same input. Float weights: sums of up to 301
# products, each rounded to 2^-24, in another order; ten times their expected 1e-6. Integer weights:
# activations are rounded to 2^-16 of the largest of their group, some 3 times their rms, with
# random signs: 3e-5 of the output's rms, and eight times that for the largest of a thousand.
TOLERANCES = {"float": 1e-5, "integer": 2.5e-4}


def plan_of(weight_format, head_format, spec=SPEC, threads=2, **machine):
    options = PlanOptions(weight_format, head_format, spec.max_position_embeddings)
    return make_plan(spec, replace(cpu_machine(threads), **machine), options)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """Shared by the tests of a module; holds the kernels that most of them use."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHFORMER_CACHE_DIR", str(folder))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: compile_kernel(plan_of(*pair)), FORMAT_PAIRS))
    return folder


@pytest.fixture
def open_backend(cache_folder, monkeypatch):
    """`open_backend(format, head_format)` -> an open backend; closed after the test."""
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(cache_folder))
    opened = []

    def open_cpu(weight_format, head_format, weights=WEIGHTS, **changes):
        plan = plan_of(weight_format, head_format, weights.spec, **changes)
        opened.append(CpuBackend(plan, packed(plan, weights), NUM_PAGES))
        return opened[-1]

    yield open_cpu
    for backend in opened:
        backend.close()


@pytest.fixture
def quick_compiler(monkeypatch):
    """Kernels that are used once are compiled without the slow optimisations."""
    flags = tuple("-O1" if flag == "-O3" else flag for flag in cpu_compile.FLAGS)
    monkeypatch.setattr(cpu_compile, "FLAGS", flags)


def page_table():
    """Pages of all sequences interleaved and backwards."""
    return np.arange(NUM_PAGES, dtype=np.int32)[::-1].reshape(PAGES_PER_SLOT, 8).T.copy()


def ids_of(length, seed=0, spec=SPEC):
    return np.random.default_rng(seed).integers(0, spec.vocab_size, length).astype(np.int32)


def batch_of(rows, wanted=None):
    """`rows` of (token, position, slot); logits of every row, or of `wanted`."""
    tokens, positions, slots = (np.array(part, np.int32) for part in zip(*rows, strict=True))
    wanted = np.arange(len(rows)) if wanted is None else wanted
    return StepBatch(tokens, positions, slots, page_table(), np.asarray(wanted, np.int32))


def rows_of(ids, slot, first=0):
    return [(int(token), first + i, slot) for i, token in enumerate(ids)]


def feed(backend, rows, size=128):
    """Logits of all rows, `size` rows a step."""
    parts = [
        backend.step(batch_of(rows[start : start + size])).logits.copy()
        for start in range(0, len(rows), size)
    ]
    return np.concatenate(parts)


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def kind_of(weight_format):
    return "float" if FORMATS[weight_format].bits > 8 else "integer"


def check_stages(backend, batch):
    """Run every stage of one step in the reference on what the CPU wrote before, and compare."""
    plan = backend.plan
    reference = ReferenceBackend(plan, backend._image, backend.num_pages)
    rows = len(batch.token_ids)
    # Attention takes each side's own queries, keys and values, and so their tolerance.
    tolerance = TOLERANCES[kind_of(plan.options.format)]
    buffers = {}
    for index, stage in enumerate(plan.stages[:-2]):
        STAGES[stage.name](reference, stage.layer, batch, buffers)
        backend.step(batch, stop_after=index)
        if stage.name == "qkv":
            record = plan.spec.layers[stage.layer]
            heads = reference._heads(stage.layer, buffers["qkv"], batch.positions)[0]
            expected = heads.reshape(rows, -1) * np.float32(record.attention_scale)
            name = "q"
        else:
            name = stage.writes[-1]
            expected = buffers[name]
        found = backend.buffer(name, rows, expected.shape[1])
        assert difference(found, expected) <= tolerance, (stage.name, stage.layer)
        if name != "q":
            buffers[name] = found
    for stage in plan.stages[-2:]:
        STAGES[stage.name](reference, stage.layer, batch, buffers)
    result = backend.step(batch)
    head_tolerance = TOLERANCES[kind_of(plan.options.head_format)]
    assert difference(result.logits, buffers["logits"]) <= head_tolerance
    picked = np.take_along_axis(buffers["logits"], result.argmax[:, None], axis=1)[:, 0]
    spare = 2 * head_tolerance * np.abs(buffers["logits"]).max()
    assert (picked >= buffers["logits"].max(axis=1) - spare).all()
    assert np.array_equal(result.argmax, result.logits.argmax(axis=1))


@pytest.mark.parametrize(("weight_format", "head_format"), FORMAT_PAIRS)
def test_every_stage_is_that_of_the_reference(open_backend, weight_format, head_format):
    backend = open_backend(weight_format, head_format)
    for rows in (1, 3, 20):  # from registers, side by side, and unpacked
        check_stages(backend, batch_of(rows_of(ids_of(rows, rows), 1)))


@pytest.mark.parametrize(("weight_format", "head_format"), FORMAT_PAIRS)
def test_a_prompt_in_chunks_of_any_size_gives_the_same_bits(
    open_backend, weight_format, head_format
):
    backend = open_backend(weight_format, head_format)
    rows = rows_of(ids_of(300), 0)
    whole = feed(backend, rows, 128)
    for size, end in ((1, 40), (3, 40), (8, 80), (11, 80), (64, 300)):
        assert np.array_equal(feed(backend, rows[:end], size), whole[:end]), size


@pytest.mark.parametrize(("weight_format", "head_format"), [("bf16", "f16"), ("int4", "int8")])
def test_a_row_of_a_mixed_batch_has_the_bits_of_the_same_request_alone(
    open_backend, weight_format, head_format
):
    backend = open_backend(weight_format, head_format)
    lengths = [LENGTH, 1, 270, 31, 32, 33, 256, 257]  # several chunks, and around their edges
    ids = [ids_of(length + 1, slot) for slot, length in enumerate(lengths)]
    alone = []
    for slot, length in enumerate(lengths):
        feed(backend, rows_of(ids[slot][:length], slot))
        alone.append(feed(backend, rows_of(ids[slot][length:], slot, length))[0])
    for slot, length in enumerate(lengths):
        feed(backend, rows_of(ids[slot][:length], slot))
    last = [(int(ids[slot][length]), length, slot) for slot, length in enumerate(lengths)]
    assert np.array_equal(feed(backend, last), np.stack(alone))
    # Decoding and two prompts in one step.
    mixed = [*rows_of(ids[0][:60], 0), *last[1:4], *rows_of(ids[4][:20], 4)]
    together = feed(backend, mixed)
    assert np.array_equal(together[60:63], np.stack(alone[1:4]))
    assert np.array_equal(together[:60], feed(backend, rows_of(ids[0][:60], 0)))


def test_any_number_of_threads_gives_the_same_bits(open_backend, quick_compiler):
    rows = rows_of(ids_of(LENGTH), 0)
    results = [feed(open_backend("int4", "int8", threads=n), rows) for n in (1, 2, 3)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_a_hundred_repeats_give_the_same_bits(open_backend):
    backend = open_backend("int4", "int8")
    rows = rows_of(ids_of(LENGTH), 0)
    expected = feed(backend, rows)[-1]
    for _ in range(100):  # of decoding deep in the sequence: chunks shared out among threads
        assert np.array_equal(feed(backend, rows[-1:])[0], expected)


@pytest.mark.parametrize("arch", PATHS)
def test_every_path_that_this_processor_has_gives_the_same_results(
    open_backend, quick_compiler, monkeypatch, arch
):
    needs, flags = PATHS[arch]
    if not needs <= cpu_flags():
        pytest.skip(f"this processor has no {arch}")
    monkeypatch.setitem(cpu_compile.TARGET_FLAGS, arch, flags)
    backend = open_backend("bf16", "int4", arch=arch)
    for rows in (1, 3, 30):
        check_stages(backend, batch_of(rows_of(ids_of(rows, rows), 1)))
    rows = rows_of(ids_of(100), 0)
    assert np.array_equal(feed(backend, rows, 7), feed(backend, rows))


def test_the_times_of_the_stages_are_parts_of_the_step(open_backend):
    backend = open_backend("int4", "int8")
    for rows in (1, 30, 2):
        batch = batch_of(rows_of(ids_of(rows), 0))
        began = time.perf_counter()
        backend.step(batch)
        whole = time.perf_counter() - began
        times = backend.stage_seconds()
        assert list(times) == list(dict.fromkeys(stage.name for stage in backend.plan.stages))
        assert all(seconds >= 0 for seconds in times.values())
        assert times["gate_up"] > 0
        assert times["lm_head"] > 0
        assert sum(times.values()) <= whole


def test_only_the_wanted_rows_have_logits(open_backend):
    backend = open_backend("bf16", "f16")
    rows = rows_of(ids_of(20), 0)
    whole = feed(backend, rows)
    result = backend.step(batch_of(rows, [3, 19]))
    assert np.array_equal(result.logits, whole[[3, 19]])
    assert backend.step(batch_of(rows, [])).logits.shape == (0, SPEC.vocab_size)


def test_a_tie_goes_to_the_lowest_id(open_backend):
    weights = SpecWeights(SPEC)
    weights.changed["lm_head", -1] = np.tile(weights.tensor("lm_head")[7], (SPEC.vocab_size, 1))
    result = open_backend("int8", "bf16", weights=weights).step(batch_of([(1, 0, 0)]))
    assert result.logits[0, 0] != 0
    assert (result.logits == result.logits[0, 0]).all()
    assert result.argmax[0] == 0


def test_a_row_with_a_nan_has_no_argmax_and_its_neighbours_are_untouched(open_backend):
    weights = SpecWeights(SPEC)
    calm = open_backend("int8", "bf16", weights=weights).step(batch_of([(1, 0, 0)]))
    embedding = weights.tensor("embed_tokens").copy()
    embedding[5] = 3e38  # layer 0 adds as much to it again: infinity, then NaN in the next norm
    weights.changed["embed_tokens", -1] = embedding
    bias = np.zeros(SPEC.hidden_size, np.float32)
    bias[3] = 3e38
    weights.changed["o_bias", 0] = bias
    result = open_backend("int8", "bf16", weights=weights).step(batch_of([(5, 0, 1), (1, 0, 0)]))
    assert np.isnan(result.logits[0]).all()
    assert result.argmax[0] == -1
    assert np.isfinite(result.logits[1]).all()
    assert calm.argmax[0] >= 0


@settings(
    max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.lists(layer_specs, min_size=5, max_size=5).map(tuple),
    hidden=st.integers(1, 150),
    vocab=st.integers(1, 100),
    pair=st.sampled_from(FORMAT_PAIRS),
    tied=st.booleans(),
)
def test_any_shape_is_right_and_its_chunks_agree(
    open_backend, quick_compiler, layers, hidden, vocab, pair, tied
):
    spec = model_spec(layers=layers, hidden_size=hidden, vocab_size=vocab, tie_word_embeddings=tied)
    backend = open_backend(*pair, weights=SpecWeights(spec))
    rows = rows_of(ids_of(40, spec=spec), 2)
    check_stages(backend, batch_of(rows[:9]))
    whole = feed(backend, rows)
    assert np.array_equal(feed(backend, rows, 1), whole)
    assert np.array_equal(feed(backend, rows, 5), whole)
