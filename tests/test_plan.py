"""Every plan covers the model exactly once, and a plan that does not is refused."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashformer.errors import PlanError, UsageError
from flashformer.model.spec import RopeSpec
from flashformer.plan.check import check
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.plan.planner import longest_context
from flashformer.plan.show import show
from flashformer.plan.tiles import late_tiles, split_tiles, stored_tiles
from flashformer.quant.formats import CHOICES
from specs import layer_spec, machine, model_spec, model_specs, packings, plan_of


@given(num_tiles=st.integers(0, 5000), num_ctas=st.integers(1, 300))
def test_every_cta_stores_its_last_tiles_from_the_end_of_the_matrix(num_tiles, num_ctas):
    first, late = split_tiles(num_tiles, num_ctas), late_tiles(num_tiles, num_ctas)
    stored = stored_tiles(first, late)
    assert sorted(stored.tolist()) == list(range(num_tiles))
    shares = [stored[a:b].tolist() for a, b in pairwise(first)]
    early = [tile for share in shares for tile in share[: len(share) - late]]
    assert early == list(range(num_tiles - late * num_ctas if late else num_tiles))
    assert all(share == sorted(share) for share in shares)


@given(num_tiles=st.integers(0, 5000), num_ctas=st.integers(1, 300))
def test_a_split_gives_every_tile_to_one_cta_and_no_cta_two_tiles_more_than_another(
    num_tiles, num_ctas
):
    first = split_tiles(num_tiles, num_ctas)
    owners = [tile for start, end in pairwise(first) for tile in range(start, end)]
    assert owners == list(range(num_tiles))
    shares = [end - start for start, end in pairwise(first)]
    assert len(shares) == num_ctas
    assert max(shares) - min(shares) <= 1


@settings(max_examples=60, deadline=None)
@given(spec=model_specs, packing=packings, num_ctas=st.integers(1, 40), batch=st.integers(1, 8))
def test_a_plan_of_any_model_passes_its_own_check(spec, packing, num_ctas, batch):
    layout, name = packing
    plan = plan_of(spec, name, batch=batch, layout=layout, num_ctas=num_ctas)
    check(plan)
    rows = {(m.name, m.layer): m.num_tiles * 16 for m in plan.matrices}
    for index, layer in enumerate(spec.layers):
        assert rows["qkv", index] >= (layer.num_q_heads + 2 * layer.num_kv_heads) * layer.head_dim
        assert rows["gate_up", index] >= 2 * layer.intermediate_size


def test_matrices_lie_in_the_order_in_which_a_token_reads_them():
    names = [(m.name, m.layer) for m in plan_of().matrices]
    layer = ["qkv", "o_proj", "gate_up", "down"]
    expected = [(name, index) for index in range(2) for name in layer]
    assert names == [("embed_tokens", -1), *expected, ("lm_head", -1)]
    tied = plan_of(model_spec(tie_word_embeddings=True))
    assert [(m.name, m.layer) for m in tied.matrices] == names[1:]


def test_the_vectors_are_those_that_the_layers_ask_for():
    every = layer_spec(qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)
    plan = plan_of(model_spec(layers=(layer_spec(), every)))
    names = [{v.name for v in plan.vectors if v.layer == index} for index in (0, 1)]
    always = {"input_layernorm", "post_attention_layernorm"}
    assert names[0] - {"inv_freq"} == always
    biases = {"qkv_bias", "o_bias", "gate_up_bias", "down_bias"}
    assert names[1] == always | biases | {"q_norm", "k_norm"}
    assert plan.vector("gate_up_bias", 1).length == plan.matrix("gate_up", 1).num_tiles * 16


@pytest.mark.parametrize("name", list(CHOICES))
def test_the_bytes_of_a_step_are_weights_once_and_keys_and_values_of_every_sequence(name):
    layers = (layer_spec(), layer_spec(window=10))
    plan = plan_of(model_spec(layers=layers), name, layout="rows", kv_format="f16")
    assert plan.kv_bytes_per_token == 2 * (2 * 2 * 12) * 2
    tile = {m.name: m.tile_bytes for m in plan.matrices}
    weights = sum(m.nbytes for m in plan.matrices if m.name != "embed_tokens")
    weights += sum(v.nbytes for v in plan.vectors)
    for context, batch in [(1, 1), (10, 1), (50, 3)]:
        past = batch * (2 * 2 * 12 * 2) * (context + min(context, 10))
        row = batch * tile["embed_tokens"] // 16
        assert plan.bytes_per_step(context, batch) == weights + past + row


def test_a_tied_embedding_adds_no_bytes_to_a_step():
    tied, untied = plan_of(model_spec(tie_word_embeddings=True)), plan_of()
    row = untied.matrix("embed_tokens").tile_bytes // 16
    assert untied.bytes_per_step(5) - tied.bytes_per_step(5) == row


def test_a_context_beyond_the_models_positions_is_refused():
    with pytest.raises(UsageError, match="128 positions; choose 1 to 128"):
        plan_of(context=129)
    assert plan_of(context=128).options.context == 128


@pytest.mark.parametrize(
    ("rope_type", "parameters", "positions"),
    [
        ("default", {}, 128),
        ("linear", {"factor": 4.0}, 512),
        ("dynamic", {"factor": 2.0}, 256),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ("llama3", {"factor": 8.0, "original_max_position_embeddings": 64}, 128),
        ("longrope", {"factor": 32.0, "original_max_position_embeddings": 4}, 128),
    ],
)
def test_rope_scaling_extends_the_context(rope_type, parameters, positions):
    rope = RopeSpec(rope_type, 10000.0, 12, 128, tuple(sorted(parameters.items())))
    assert longest_context(model_spec(ropes=(rope,))) == positions


@pytest.mark.parametrize(
    "options",
    [
        {"format": "int3"},
        {"head_format": "bf15"},
        {"context": 0},
        {"max_batch": 0},
        {"max_batch": 65},
    ],
)
def test_options_that_make_no_sense_are_refused_with_a_sentence(options):
    fields = {"format": "bf16", "head_format": "bf16", "context": 64, "max_batch": 8} | options
    with pytest.raises(UsageError, match=r"^[A-Z].*\.$"):
        make_plan(model_spec(), machine(), PlanOptions(**fields))


def test_equal_plans_have_equal_keys_and_everything_that_matters_changes_the_key():
    plan = plan_of()
    others = [
        plan_of(model_spec(rms_norm_eps=1e-6)),
        plan_of(weight_format="int8"),
        plan_of(head_format="int8"),
        plan_of(context=65),
        plan_of(batch=4),
        plan_of(num_ctas=2),
        plan_of(arch="avx2"),
        plan_of(layout="rows"),
        plan_of(kv_format="f16"),
    ]
    assert plan.key == plan_of().key
    assert len({p.key for p in (plan, *others)}) == len(others) + 1


def test_an_image_is_shared_by_plans_that_differ_only_in_who_reads_it():
    image_key = plan_of().image_key
    assert image_key == plan_of(num_ctas=7, batch=2, context=9, kv_format="bf16").image_key
    for other in (
        plan_of(layout="rows"),
        plan_of(weight_format="f16"),
        plan_of(model_spec(layers=(layer_spec(intermediate_size=45),) * 2)),
        plan_of(model_spec(ropes=(RopeSpec("default", 5000.0, 12, 128),))),
    ):
        assert other.image_key != image_key


def test_a_plan_is_json():
    plan = plan_of()
    value = json.loads(json.dumps(plan.to_json()))
    assert value["matrices"][1]["first_tile"] == list(plan.matrices[1].first_tile)
    assert value["spec"]["layers"][0]["head_dim"] == 12
    assert value["image_bytes"] == plan.image_bytes


def test_the_table_shows_every_matrix_with_its_bytes_and_joins_equal_layers():
    layers = (layer_spec(), layer_spec(rope_idx=-1), layer_spec(window=5), layer_spec())
    plan = plan_of(model_spec(layers=layers))
    text = show(plan)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if " qkv " in line] == ["0..1", "2", "3"]
    for matrix in plan.matrices:
        assert f"{matrix.nbytes:,}" in text
        assert f"{matrix.rows} x {matrix.cols}" in text
    assert "last 5" in text
    assert f"{plan.image_bytes:,}" in text


def _with_matrix(plan, name, layer, **changes):
    matrices = [
        replace(m, **changes) if (m.name, m.layer) == (name, layer) else m for m in plan.matrices
    ]
    return replace(plan, matrices=tuple(matrices))


def _with_vector(plan, index, **changes):
    vectors = list(plan.vectors)
    vectors[index] = replace(vectors[index], **changes)
    return replace(plan, vectors=tuple(vectors))


def _swapped(items, a, b):
    items = list(items)
    items[a], items[b] = items[b], items[a]
    return tuple(items)


PLAN = plan_of()
DOWN = PLAN.matrix("down", 1)
FIRST = DOWN.first_tile
MUTATIONS = {
    "a CTA's tiles are left out": lambda p: _with_matrix(p, "down", 1, first_tile=(1, *FIRST[1:])),
    "the last tile has no owner": lambda p: _with_matrix(
        p, "down", 1, first_tile=(*FIRST[:-1], FIRST[-1] - 1)
    ),
    "a split runs backwards": lambda p: _with_matrix(
        p, "down", 1, first_tile=(0, FIRST[-1], 0, FIRST[-1])
    ),
    "a CTA has more late tiles than tiles": lambda p: _with_matrix(p, "down", 1, late=9),
    "a split is unbalanced": lambda p: _with_matrix(p, "down", 1, first_tile=(0, 0, 0, FIRST[-1])),
    "a split has a CTA too many": lambda p: _with_matrix(
        p, "down", 1, first_tile=(*FIRST, FIRST[-1])
    ),
    "a matrix has a row too few": lambda p: _with_matrix(p, "qkv", 0, rows=p.matrices[1].rows - 1),
    "a matrix has a column too many": lambda p: _with_matrix(p, "qkv", 0, cols=41),
    "a matrix has another format": lambda p: _with_matrix(p, "qkv", 0, format="int8"),
    "a format is unknown": lambda p: replace(p, options=replace(p.options, format="int3")),
    "a layout is unknown": lambda p: replace(p, machine=replace(p.machine, layout="spiral")),
    "a matrix is missing": lambda p: replace(p, matrices=p.matrices[:-1]),
    "a matrix comes twice": lambda p: replace(p, matrices=(*p.matrices, p.matrices[-1])),
    "two matrices swap places": lambda p: replace(p, matrices=_swapped(p.matrices, 1, 2)),
    "two offsets are swapped": lambda p: _with_matrix(
        _with_matrix(p, "o_proj", 0, offset=p.matrix("o_proj", 1).offset),
        "o_proj",
        1,
        offset=p.matrix("o_proj", 0).offset,
    ),
    "an offset is not aligned": lambda p: _with_matrix(p, "down", 1, offset=DOWN.offset + 64),
    "an offset is negative": lambda p: _with_matrix(p, "embed_tokens", -1, offset=-4096),
    "two matrices overlap": lambda p: _with_matrix(
        p, "o_proj", 0, offset=p.matrix("qkv", 0).offset + 4096
    ),
    "a matrix covers the vectors": lambda p: _with_matrix(p, "embed_tokens", -1, offset=0),
    "the image is too short": lambda p: replace(p, image_bytes=p.matrices[-1].offset + 4096),
    "a vector is not aligned": lambda p: _with_vector(p, 0, offset=4),
    "two vectors overlap": lambda p: _with_vector(p, 1, offset=64),
    "a vector is too short": lambda p: _with_vector(p, 1, length=39),
    "a vector is missing": lambda p: replace(p, vectors=p.vectors[1:]),
    "a vector comes twice": lambda p: replace(
        p, vectors=(*p.vectors, replace(p.vectors[1], offset=p.vectors[-1].offset + 4096))
    ),
    "a stage is missing": lambda p: replace(p, stages=p.stages[:3] + p.stages[4:]),
    "a stage runs twice": lambda p: replace(p, stages=(*p.stages[:3], *p.stages[2:])),
    "two stages are swapped": lambda p: replace(p, stages=_swapped(p.stages, 1, 2)),
    "a read has no write": lambda p: replace(p, stages=p.stages[1:]),
    "an attention factor is missing": lambda p: replace(p, attention_factors=()),
    "a layer's rope does not exist": lambda p: replace(
        p, spec=replace(p.spec, layers=(p.spec.layers[0], layer_spec(rope_idx=1)))
    ),
    "no CTA": lambda p: replace(p, machine=replace(p.machine, num_ctas=0)),
    "no page": lambda p: replace(p, machine=replace(p.machine, page_tokens=0)),
    "a KV format is unknown": lambda p: replace(p, machine=replace(p.machine, kv_format="f8")),
    "a rank of no GPU": lambda p: replace(p, machine=replace(p.machine, rank=1)),
    "no context": lambda p: replace(p, options=replace(p.options, context=0)),
    "a batch beyond the kernels": lambda p: replace(p, options=replace(p.options, max_batch=9)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_plan_that_breaks_an_invariant_is_refused(mutation):
    check(PLAN)
    with pytest.raises(PlanError, match=r"^[A-Z].*\.$"):
        check(MUTATIONS[mutation](PLAN))
