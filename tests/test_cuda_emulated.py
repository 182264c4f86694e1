"""The whole CUDA decoder, its threads run by a CPU: a row's bits and what they mean."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from emulated_decoder import EmulatedDecoder
from flashformer.backends.cuda.flight import ABANDONED, UNWRITTEN
from flashformer.backends.cuda.geometry import past_of, stage_shape
from flashformer.backends.cuda.machine import MIN_SLOTS, ROW_CLASSES, Device, fit_machine
from flashformer.codegen.exchange import padded, residual_travels
from flashformer.model.spec import RopeSpec
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import head_format
from specs import SpecWeights, layer_spec, model_spec, packed
from stage_oracle import Watched

H200 = Device("H200", 9, 0, 132, 227 << 10, cooperative=True)
STEPS = 3
LOST_BITS = 6
# Of eight rows: within a page, at its ends, and behind the chunk of 256 positions.
POSITIONS = (300, 3, 64, 130, 31, 290, 0, 254)
# Of neighbouring rows.
SETS = ((0,), (1,), (6,), (7,), (0, 1), (4, 5), (2, 3, 4, 5))
SMALL = {"slot_bytes": 2048, "window_bytes": 2048}
LARGE = {"slot_bytes": 16384, "window_bytes": 4096}


@dataclass(frozen=True)
class Model:
    weight_format: str
    heads: tuple[int, int, int]  # of queries, of keys, channels
    inner: int = 555
    hidden: int = 77
    rotary_dim: int = 64
    layer: dict = field(default_factory=dict)
    second: dict = field(default_factory=dict)  # of the second layer alone
    machine: dict = field(default_factory=lambda: SMALL)
    classes: tuple[int, ...] = ROW_CLASSES


MODELS = {
    "bf16, head 128, groups of 4": Model(
        "bf16", (4, 1, 128), inner=1111, rotary_dim=128, machine=LARGE
    ),
    "bf16, the residual travels, QK-norm, a window": Model(
        "bf16", (6, 2, 64), hidden=40, rotary_dim=48, layer={"qk_norm": True},
        second={"window": 70}, machine={**SMALL, "num_ctas": 4},
    ),
    "f16, biases": Model(
        "f16", (3, 1, 24), rotary_dim=24,
        layer={"qkv_bias": True, "o_bias": True, "mlp_bias": True}, classes=(1, 8),
    ),
    "int8, no positions in the second layer": Model(
        "int8", (4, 2, 64), second={"rope_idx": -1}, classes=(1, 4, 8)
    ),
    "fp8": Model("fp8", (4, 2, 64), classes=(1, 8)),
    "int4g128, biases": Model(
        "int4g128", (4, 2, 64), layer={"qkv_bias": True, "mlp_bias": True}, classes=(1, 2, 8)
    ),
    "int4z": Model("int4z", (4, 2, 64), classes=(1, 8)),
}  # fmt: skip


def plan_of(name):
    model = MODELS[name]
    q_heads, kv_heads, head_dim = model.heads
    layer = layer_spec(
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=model.inner,
        attention_scale=head_dim**-0.5,
        **model.layer,
    )
    spec = model_spec(
        (layer, replace(layer, **model.second)),
        hidden_size=model.hidden,
        vocab_size=101,
        max_position_embeddings=1024,
        ropes=(RopeSpec("default", 10000.0, model.rotary_dim, 1024),),
    )
    page_tokens = min(64, model.machine["slot_bytes"] // (2 * padded(head_dim)))
    changes = {"num_ctas": 3, "page_tokens": page_tokens, **model.machine}
    machine = replace(fit_machine(H200, spec), **changes)
    head = head_format(model.weight_format, "cuda")
    return make_plan(spec, machine, PlanOptions(model.weight_format, head, 1024, 8))


@pytest.fixture(scope="module", params=MODELS)
def decoder(request, tmp_path_factory):
    plan = plan_of(request.param)
    image = packed(plan, SpecWeights(plan.spec, seed=7))
    folder, classes = tmp_path_factory.mktemp("simt"), MODELS[request.param].classes
    return EmulatedDecoder(folder, plan, image, 8 * pages_of(plan), classes)


def pages_of(plan):
    return -(-(max(POSITIONS) + STEPS) // plan.machine.page_tokens)


def table_of(plan):
    pages = pages_of(plan)
    return np.random.default_rng(0).permutation(8 * pages).reshape(8, pages).astype(np.int32)


def decode(decoder, slots, num_steps=STEPS, **changes):
    """A launch of some of the eight rows, over the same past."""
    decoder.reset_past()
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
    """And with a ring of any length. Sums lose bits, or the rounding to bf16 behind them would hide
    most changes of order."""
    together = decode(decoder, range(8), lost_bits=LOST_BITS)
    past = past_of_slots(decoder, range(8))

    assert np.isfinite(together.logits).all()
    for rows in SETS:
        ring = {"num_slots": MIN_SLOTS + rows[0]}
        few = decode(decoder, rows, seed=rows[0], lost_bits=LOST_BITS, **ring)
        assert np.array_equal(few.tokens, together.tokens[:, rows])
        assert np.array_equal(few.logits, together.logits[list(rows)])
        assert np.array_equal(past_of_slots(decoder, rows), past[:, rows])


def test_a_launch_of_many_tokens_draws_what_launches_of_one_draw(decoder):
    slots = (0, 5)
    many = decode(decoder, slots)
    decoder.reset_past()
    tokens = [5 + slot for slot in slots]
    for step in range(STEPS):
        positions = [POSITIONS[slot] + step for slot in slots]
        one = decoder.launch(tokens, positions, slots, table_of(decoder.plan), 1, seed=step)
        tokens = one.tokens[0].tolist()
        assert tokens == many.tokens[step].tolist()
    assert np.array_equal(one.logits, many.logits)


def test_every_stage_is_within_the_bound_of_its_arithmetic(decoder):
    """Over pasts of several pages and chunks, and with many rows of one sequence."""
    decoder.reset_past()
    plan, table = decoder.plan, table_of(decoder.plan)
    watched = Watched(decoder, decoder.image, table)
    for layer in range(plan.spec.num_layers):
        for slot, position in enumerate(POSITIONS):
            watched.oracle.past[layer, slot] = decoder.past(layer, table[slot], position)
    rng = np.random.default_rng(3)

    def step(positions, slots):
        return watched.step(rng.integers(0, plan.spec.vocab_size, len(slots)), positions, slots)

    checked = step(list(POSITIONS), list(range(8)))
    step([301, 302, 4, 5, 6, 255], [0, 0, 1, 1, 1, 7])

    assert len(checked) == 5 * plan.spec.num_layers + 1


@pytest.mark.parametrize("decoder", list(MODELS)[:2], indirect=True)
def test_a_stop_word_ends_the_launch_on_all_ctas_at_the_same_token(decoder):
    whole = decode(decoder, (0, 1))
    endings = set()
    for stop_at in [1, *range(whole.turns // 10, whole.turns, whole.turns // 10)]:
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


@pytest.mark.parametrize("decoder", list(MODELS)[:1], indirect=True)
@pytest.mark.parametrize("firm_steps", [1, 2])
def test_a_firm_token_is_drawn_to_its_end_whatever_the_host_wants(decoder, firm_steps):
    whole = decode(decoder, (0, 1))
    stopped = decode(decoder, (0, 1), stop_at=1, firm_steps=firm_steps)

    assert np.array_equal(stopped.tokens[0], whole.tokens[0])
    assert (stopped.tokens[1:] == UNWRITTEN).all()  # the host's word ends the launch behind it
