"""The reference backend computes what the model says, and every row by itself."""

import numpy as np
import pytest

from flashformer.backends.base import StepBatch
from flashformer.backends.reference import ReferenceBackend, reference_machine
from flashformer.plan.pack import MATRIX_ROLES
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.decode import decode
from flashformer.quant.encode import encode
from flashformer.quant.formats import FORMATS
from specs import SpecWeights, layer_spec, model_spec, packed, plan_of
from test_model_forward import PlainForward

BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
# Together: every bias, QK-norm, a window, a layer without positions, groups of 1, 2 and 3 heads.
SPEC = model_spec(
    layers=(
        layer_spec(**BIASES, qk_norm=True),
        layer_spec(window=5, num_q_heads=3, num_kv_heads=1),
        layer_spec(rope_idx=-1, num_q_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=9),
    )
)
WEIGHTS = SpecWeights(SPEC)
# As in the test of the spec: float32 sums against float64, relative to the largest number.
TOLERANCE = 2e-5
NUM_PAGES = 24


class SpecForward(PlainForward):
    def __init__(self, spec, weights):
        self.spec, self.weights = spec, weights


def open_plan(plan, weights=WEIGHTS):
    return ReferenceBackend(plan, packed(plan, weights), NUM_PAGES)


def ids_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, SPEC.vocab_size, length).astype(np.int32)


def page_table(plan):
    """Pages of all sequences interleaved and backwards."""
    width = NUM_PAGES // 8
    return np.arange(NUM_PAGES, dtype=np.int32)[::-1].reshape(width, 8).T.copy()


def step(backend, rows):
    """`rows` of (token, position, slot); logits of every row."""
    tokens, positions, slots = (np.array(part, np.int32) for part in zip(*rows, strict=True))
    wanted = np.arange(len(rows), dtype=np.int32)
    return backend.step(StepBatch(tokens, positions, slots, page_table(backend.plan), wanted))


def rows_of(ids, slot, first=0):
    return [(int(token), first + i, slot) for i, token in enumerate(ids)]


def test_logits_are_those_of_a_plain_forward_pass():
    backend, ids = open_plan(plan_of(SPEC)), ids_of(20)
    expected = SpecForward(SPEC, WEIGHTS).logits(ids)
    found = step(backend, rows_of(ids, 0)).logits
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_a_prompt_in_chunks_or_one_by_one_gives_the_same_bits():
    ids = ids_of(20)
    whole = step(open_plan(plan_of(SPEC)), rows_of(ids, 0)).logits
    for size in (1, 7):
        backend = open_plan(plan_of(SPEC))
        parts = [
            step(backend, rows_of(ids[start : start + size], 0, start)).logits
            for start in range(0, len(ids), size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_row_of_a_mixed_batch_has_the_bits_of_the_same_request_alone():
    prompts = [ids_of(length, seed=length) for length in (1, 4, 9, 17, 20, 3, 8, 12)]
    backend = open_plan(plan_of(SPEC))
    for slot, ids in enumerate(prompts[1:7], start=1):  # the first and the last have no past
        step(backend, rows_of(ids[:-1], slot))
    last = [(int(ids[-1]), len(ids) - 1, slot) for slot, ids in enumerate(prompts[:7])]
    together = step(backend, [*last, *rows_of(prompts[7], 7)]).logits
    for slot, ids in enumerate(prompts):
        alone = step(open_plan(plan_of(SPEC)), rows_of(ids, slot)).logits[-1]
        assert np.array_equal(together[slot if slot < 7 else -1], alone)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "int4g128"])
def test_a_panel_image_gives_the_bits_of_a_row_image(name):
    rows = rows_of(ids_of(9), 3)
    found = [
        step(open_plan(plan_of(SPEC, name, layout=layout)), rows).logits
        for layout in ("rows", "panel")
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize("name", ["int8", "int4", "int4g128"])
def test_quantised_weights_compute_as_the_numbers_they_decode_to(name):
    plan = plan_of(SPEC, name)
    decoded = SpecWeights(SPEC)
    for matrix in plan.matrices:
        for role in MATRIX_ROLES[matrix.name]:
            values = WEIGHTS.tensor(role, matrix.layer).astype(np.float32)
            back = decode(encode(values, FORMATS[name]), FORMATS[name])
            assert not np.array_equal(back, values)
            decoded.changed[role, matrix.layer] = back
    rows = rows_of(ids_of(9), 0)
    exact = step(open_plan(plan_of(SPEC, "f32"), decoded), rows).logits
    assert np.array_equal(step(open_plan(plan), rows).logits, exact)


@pytest.mark.parametrize(("kv_format", "bits"), [("f16", 11), ("bf16", 8)])
def test_keys_and_values_are_rounded_to_the_format_of_the_machine(kv_format, bits):
    rows = rows_of(ids_of(20), 0)
    exact = step(open_plan(plan_of(SPEC)), rows).logits
    rounded = step(open_plan(plan_of(SPEC, kv_format=kv_format)), rows).logits
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    # Each of three layers rounds keys and values by half a unit, and lengthens what came before.
    assert 0 < error <= 3 * 2.0**-bits


def test_the_trace_holds_what_every_stage_wrote():
    backend, ids = open_plan(plan_of(SPEC)), ids_of(6)
    backend.trace = {}
    logits = step(backend, rows_of(ids, 0)).logits
    trace, spec = backend.trace, SPEC
    assert list(trace) == [(stage.name, stage.layer) for stage in backend.plan.stages]
    plain = SpecForward(spec, WEIGHTS)
    x = plain.weight("embed_tokens")[ids]
    assert np.array_equal(trace["embed", -1], x)
    for i, layer in enumerate(spec.layers):
        normed = plain.norm(x, "input_layernorm", i)
        qkv = [plain.project(normed, role, i, layer.qkv_bias) for role in "qkv"]
        x = x + plain.attention(normed, i)
        after_attention = x
        x = x + plain.mlp(plain.norm(x, "post_attention_layernorm", i), i)
        for name, expected in [
            ("qkv", np.concatenate(qkv, axis=1)),
            ("o_proj", after_attention),
            ("down", x),
        ]:
            assert trace[name, i].shape == expected.shape
            assert np.abs(trace[name, i] - expected).max() <= TOLERANCE * np.abs(expected).max()
        assert trace["attention", i].shape == (6, layer.q_rows)
        assert trace["gate_up", i].shape == (6, layer.intermediate_size)
    assert np.array_equal(trace["lm_head", -1], logits)
    assert np.array_equal(trace["sample", -1], logits.argmax(axis=1))


def test_logits_come_for_the_rows_that_want_them():
    ids = ids_of(10)
    rows = np.arange(10, dtype=np.int32)
    plan = plan_of(SPEC)
    every = step(open_plan(plan), rows_of(ids, 0))
    slots = np.zeros(10, np.int32)
    wanted = np.array([2, 9], np.int32)
    some = open_plan(plan).step(StepBatch(ids, rows, slots, page_table(plan), wanted))
    assert np.array_equal(some.logits, every.logits[wanted])
    assert np.array_equal(some.argmax, every.argmax[wanted])
    none = open_plan(plan).step(StepBatch(ids, rows, slots, page_table(plan), wanted[:0]))
    assert none.logits.shape == (0, SPEC.vocab_size)


def test_the_largest_logit_is_the_first_of_equals_and_none_beside_a_nan():
    weights = SpecWeights(SPEC)
    head = weights.tensor("lm_head").astype(np.float32)
    rows = rows_of(ids_of(5), 0)
    best = int(step(open_plan(plan_of(SPEC), weights), rows).argmax[-1])
    others = [row for row in (5, 30, 70) if row != best]
    head[others] = head[best]
    weights.changed["lm_head", -1] = head
    result = step(open_plan(plan_of(SPEC, "f32"), weights), rows)
    assert result.argmax[-1] == min(best, *others)
    assert result.argmax.dtype == np.int32
    plan = plan_of(SPEC)
    image = packed(plan, weights)
    norm = plan.vector("norm")
    image[norm.offset : norm.offset + 4].view(np.float32)[:] = np.nan
    assert (step(ReferenceBackend(plan, image, NUM_PAGES), rows).argmax == -1).all()


def test_a_model_too_large_to_keep_unpacked_gives_the_same_bits(monkeypatch):
    rows = rows_of(ids_of(5), 0)
    kept = step(open_plan(plan_of(SPEC)), rows).logits
    monkeypatch.setattr("flashformer.backends.reference.KEPT_BYTES", 0)
    assert np.array_equal(step(open_plan(plan_of(SPEC)), rows).logits, kept)


def test_the_reference_machine_makes_a_plan_and_closing_twice_does_nothing():
    plan = make_plan(SPEC, reference_machine(), PlanOptions(context=64))
    backend = open_plan(plan)
    assert (backend.plan, backend.num_pages) == (plan, NUM_PAGES)
    step(backend, rows_of(ids_of(3), 0))
    backend.close()
    backend.close()
