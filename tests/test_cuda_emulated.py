"""The whole CUDA decoder, its threads run by a CPU: a row's bits and what they mean."""

import dataclasses

import numpy as np
import pytest

from emulated_decoder import EmulatedDecoder
from flashformer.backends.cuda.flight import ABANDONED, UNWRITTEN
from flashformer.backends.cuda.geometry import past_of, stage_shape
from flashformer.backends.cuda.machine import ROW_CLASSES, Device, fit_machine
from flashformer.codegen.exchange import residual_travels
from flashformer.model.spec import RopeSpec
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import head_format
from specs import SpecWeights, layer_spec, model_spec, packed
from stage_oracle import Watched

H200 = Device("H200", 9, 0, 132, 227 << 10, cooperative=True)
STEPS = 3
# Of eight rows: within a page, at its ends, and behind the chunk of 256 positions.
POSITIONS = (300, 3, 64, 130, 31, 290, 0, 254)
SMALL = {"slot_bytes": 4096, "window_bytes": 4096}
# name -> (format, query heads, kv heads, head_dim, rotary_dim, fields of both layers, of the
# second, of the machine)
MODELS = {
    "bf16, head 128, groups of 4": (
        "bf16", 4, 1, 128, 128, {}, {}, {"slot_bytes": 16384, "window_bytes": 4096},
    ),
    "bf16, the residual travels, QK-norm, a window": (
        "bf16", 6, 2, 64, 48, {"qk_norm": True}, {"window": 70}, {**SMALL, "num_ctas": 6},
    ),
    "f16, biases": (
        "f16", 3, 1, 24, 24, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}, {}, SMALL,
    ),
    "int8, no positions in the second layer": (
        "int8", 4, 2, 64, 64, {}, {"rope_idx": -1}, SMALL,
    ),
    "fp8": ("fp8", 4, 2, 64, 64, {}, {}, SMALL),
    "int4g128, biases": ("int4g128", 4, 2, 64, 64, {"qkv_bias": True, "mlp_bias": True}, {}, SMALL),
    "int4z": ("int4z", 4, 2, 64, 64, {}, {}, SMALL),
}  # fmt: skip


def plan_of(name):
    weight_format, q_heads, kv_heads, head_dim, rotary_dim, fields, second, changes = MODELS[name]
    layer = layer_spec(
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=1111,
        attention_scale=head_dim**-0.5,
        **fields,
    )
    spec = model_spec(
        (layer, dataclasses.replace(layer, **second)),
        hidden_size=77,
        vocab_size=101,
        max_position_embeddings=1024,
        ropes=(RopeSpec("default", 10000.0, rotary_dim, 1024),),
    )
    machine = fit_machine(H200, spec)
    pages = min(machine.page_tokens, changes["slot_bytes"] // (2 * -(-head_dim // 16) * 16))
    pages = 1 << pages.bit_length() - 1
    machine = dataclasses.replace(machine, **{"num_ctas": 3, "page_tokens": pages, **changes})
    return make_plan(
        spec, machine, PlanOptions(weight_format, head_format(weight_format, "cuda"), 1024, 8)
    )


@pytest.fixture(scope="module", params=MODELS)
def decoder(request, tmp_path_factory):
    plan = plan_of(request.param)
    image = packed(plan, SpecWeights(plan.spec, seed=7))
    return EmulatedDecoder(
        tmp_path_factory.mktemp("simt"), plan, image, 8 * pages_of(plan), ROW_CLASSES
    )


def pages_of(plan):
    return -(-(max(POSITIONS) + STEPS) // plan.machine.page_tokens)


def table_of(plan):
    pages = pages_of(plan)
    return np.random.default_rng(0).permutation(8 * pages).reshape(8, pages).astype(np.int32)


def decode(decoder, slots, num_steps=STEPS, **changes):
    """A launch of some of the eight rows, over the same past."""
    decoder.fill_past(seed=5)
    tokens = [5 + slot for slot in slots]
    positions = [POSITIONS[slot] for slot in slots]
    return decoder.launch(tokens, positions, slots, table_of(decoder.plan), num_steps, **changes)


def test_the_models_have_down_projections_of_both_kinds():
    for name in MODELS:
        plan = plan_of(name)
        one, eight = (stage_shape(plan, plan.matrix("down", 0), rows) for rows in (1, 8))
        assert one.whole
        assert one.num_windows == 2  # early and late columns
        assert not eight.whole
        assert past_of(plan, plan.spec.layers[0], 300, 300).num_chunks > 1
        assert residual_travels(plan) == ("travels" in name)


def past_of_slots(decoder, slots):
    """Every layer's keys and values of some rows."""
    layers = decoder.kv.reshape(decoder.plan.spec.num_layers, decoder.num_pages, -1)
    return layers[:, table_of(decoder.plan)[list(slots)]]


def test_a_row_has_the_same_bits_in_a_kernel_of_any_number_of_rows(decoder):
    together = decode(decoder, range(8))
    past = past_of_slots(decoder, range(8))

    assert np.isfinite(together.logits).all()
    for count in (1, 2, 4):
        for first in range(0, 8, count):
            few = decode(decoder, range(first, first + count), seed=first + count)
            rows = slice(first, first + count)
            assert np.array_equal(few.tokens, together.tokens[:, rows])
            assert np.array_equal(few.logits, together.logits[rows])
            assert np.array_equal(past_of_slots(decoder, range(8)[rows]), past[:, rows])


def test_a_launch_of_many_tokens_draws_what_launches_of_one_draw(decoder):
    slots = (0, 5)
    many = decode(decoder, slots)
    decoder.fill_past(seed=5)
    tokens = [5 + slot for slot in slots]
    for step in range(STEPS):
        positions = [POSITIONS[slot] + step for slot in slots]
        one = decoder.launch(tokens, positions, slots, table_of(decoder.plan), 1, seed=step)
        tokens = one.tokens[0].tolist()
        assert tokens == many.tokens[step].tolist()
    assert np.array_equal(one.logits, many.logits)


def test_every_stage_is_within_the_bound_of_its_arithmetic(decoder):
    watched = Watched(decoder, decoder.image, table_of(decoder.plan))
    rng = np.random.default_rng(3)
    decoder.kv[:] = 255  # NaN

    def step(positions, slots):
        ids = rng.integers(0, decoder.plan.spec.vocab_size, len(slots))
        return watched.step(ids, positions, slots)

    for first in range(0, 24, 8):
        checked = step(list(range(first, first + 8)), [0] * 8)
    step([24, 0, 1, 2, 0], [0, 1, 1, 1, 2])
    step([25], [0])

    assert len(checked) == 5 * decoder.plan.spec.num_layers + 1


def test_a_stop_word_ends_the_launch_on_all_ctas_at_the_same_token(decoder):
    whole = decode(decoder, (0, 1))
    endings = set()
    for stop_at in [1, *range(whole.turns // 12, whole.turns, whole.turns // 12)]:
        stopped = decode(decoder, (0, 1), stop_at=stop_at)
        written = (stopped.tokens != UNWRITTEN).all(1).sum()
        abandoned = (stopped.tokens[written - 1] == ABANDONED).all()
        good = written - abandoned
        assert stopped.barriers == written % 2
        assert np.array_equal(stopped.tokens[:good], whole.tokens[:good])
        assert (stopped.tokens[written:] == UNWRITTEN).all()
        endings.add((int(good), bool(abandoned)))

    assert (0, True) in endings
    assert len(endings) > 2
