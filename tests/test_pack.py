"""The image holds the weights: all of them, in their places, and nothing else."""

from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashformer.errors import CheckpointError
from flashformer.model.roles import layer_roles, model_roles, role_shape
from flashformer.plan import pack as pack_module
from flashformer.plan.pack import (
    MATRIX_ROLES,
    pack,
    read_vector,
    unpack,
    unpack_rows,
    unpack_tiles,
)
from flashformer.quant.decode import decode
from flashformer.quant.encode import encode
from flashformer.quant.formats import FORMATS
from specs import PACKINGS, SpecWeights, layer_spec, model_spec, model_specs, packed, packings
from specs import plan_of as make

EVERYTHING = layer_spec(qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)


def source(weights, matrix):
    parts = [weights.tensor(role, matrix.layer) for role in MATRIX_ROLES[matrix.name]]
    return np.concatenate([part.astype(np.float32) for part in parts])


def quantised(values, name):
    return decode(encode(values, FORMATS[name]), FORMATS[name])


@settings(max_examples=40, deadline=None)
@given(spec=model_specs, packing=packings, num_ctas=st.integers(1, 9))
def test_unpacking_an_image_gives_the_quantised_weights_of_any_model(spec, packing, num_ctas):
    layout, name = packing
    kind = "cuda" if layout == "fragment" else "cpu"  # some tiles of gate_up are not in row order
    plan = make(spec, name, layout=layout, num_ctas=num_ctas, kind=kind)
    weights = SpecWeights(spec)
    image = packed(plan, weights)
    for matrix in plan.matrices:
        expected = quantised(source(weights, matrix), name)
        assert np.array_equal(unpack(plan, image, matrix), expected)


@pytest.mark.parametrize("job_weights", [1, 1 << 11, 1 << 30])
@pytest.mark.parametrize("name", ["bf16", "int4"])
@pytest.mark.parametrize(("kind", "layout"), [("cpu", "panel"), ("cuda", "fragment")])
def test_the_image_does_not_depend_on_how_the_work_is_cut(
    monkeypatch, kind, layout, name, job_weights
):
    spec = model_spec(layers=(replace(EVERYTHING, intermediate_size=150),))
    plan = make(spec, name, kind=kind, layout=layout)
    assert (plan.matrix("gate_up", 0).late > 0) == (kind == "cuda")
    whole = packed(plan)
    monkeypatch.setattr(pack_module, "JOB_WEIGHTS", job_weights)
    assert np.array_equal(packed(plan), whole)


@pytest.mark.parametrize(("layout", "name"), PACKINGS)
def test_padding_rows_and_columns_weigh_nothing(layout, name):
    plan = make(model_spec(hidden_size=37, vocab_size=19), name, layout=layout)
    image = packed(plan)
    wide = replace(plan.matrix("lm_head"), cols=plan.matrix("lm_head").cols + 1)
    assert wide.num_tiles == plan.matrix("lm_head").num_tiles
    assert wide.tile_bytes == plan.matrix("lm_head").tile_bytes
    stored = unpack_tiles(plan, image, wide, 0, wide.num_tiles)
    assert not stored[19:].any()
    assert not stored[:, 37].any()
    assert stored[:19, :37].any(axis=1).all()


def test_bytes_that_belong_to_nothing_are_zero():
    plan = make()
    image = packed(plan)
    for item in (*plan.matrices, *plan.vectors):
        image[item.offset : item.offset + item.nbytes] = 0
    assert not image.any()


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_single_rows_unpack_to_the_rows_of_the_matrix(name):
    plan = make(weight_format=name)
    image, matrix = packed(plan), plan.matrix("embed_tokens")
    rows = np.array([70, 0, 16, 15, 0])
    whole = unpack(plan, image, matrix)
    assert np.array_equal(unpack_rows(plan, image, matrix, rows), whole[rows])


def test_biases_follow_tiles_that_are_not_in_row_order():
    spec = model_spec(layers=(replace(EVERYTHING, intermediate_size=150),))
    plan, weights = make(spec, kind="cuda", layout="fragment"), SpecWeights(spec)
    found = read_vector(packed(plan, weights), plan.vector("gate_up_bias", 0)).reshape(-1, 2, 8)
    matrix = plan.matrix("gate_up", 0)
    assert matrix.late > 0
    by_rows = found[matrix.places]
    for part, role in enumerate(("gate_bias", "up_bias")):
        expected = weights.tensor(role, 0).astype(np.float32)
        assert np.array_equal(by_rows[:, part].reshape(-1)[: len(expected)], expected)


def test_vectors_are_float32_and_biases_follow_the_stored_rows():
    spec = model_spec(layers=(EVERYTHING,))
    plan, weights = make(spec), SpecWeights(spec)
    image = packed(plan, weights)

    def tensor(role, layer=0):
        return weights.tensor(role, layer).astype(np.float32)

    def stored(name, layer=0):
        return read_vector(image, plan.vector(name, layer))

    for role in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"):
        assert np.array_equal(stored(role), tensor(role))
    assert np.array_equal(stored("norm", -1), tensor("norm", -1))
    assert np.array_equal(stored("inv_freq"), spec.ropes[0].frequencies(64)[0])
    qkv = np.concatenate([tensor("q_bias"), tensor("k_bias"), tensor("v_bias")])
    assert np.array_equal(stored("qkv_bias")[: len(qkv)], qkv)
    assert np.array_equal(stored("o_bias")[:40], tensor("o_bias"))
    tiles = stored("gate_up_bias").reshape(-1, 2, 8)
    for half, role in enumerate(("gate_bias", "up_bias")):
        assert np.array_equal(tiles[:, half].reshape(-1)[:44], tensor(role))
        assert not tiles[:, half].reshape(-1)[44:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize(("role", "layer"), [("k_proj", 1), ("lm_head", -1), ("up_bias", 0)])
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_tensor(role, layer, dtype, bad):
    spec = model_spec(layers=(EVERYTHING, EVERYTHING))
    weights = SpecWeights(spec, dtype)
    damaged = weights.tensor(role, layer).copy()
    damaged.reshape(-1)[-1] = bad
    weights.changed[role, layer] = damaged
    where = role if layer < 0 else f"{role} of layer {layer}"
    with pytest.raises(CheckpointError, match=where):
        packed(make(spec), weights)


@pytest.mark.parametrize("name", ["f16", "int4"])
def test_weights_too_large_for_a_format_are_refused(name):
    spec = model_spec()
    weights = SpecWeights(spec, np.float32)
    large = weights.tensor("down_proj", 1).copy()
    large[3, 5] = 1e6
    weights.changed["down_proj", 1] = large
    with pytest.raises(CheckpointError, match=f"down of layer 1 .* format {name}; choose bf16"):
        packed(make(spec, name), weights)
    weights.changed["down_proj", 1] = np.minimum(large, 60000)
    packed(make(spec, name), weights)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_checkpoint_of_any_float_type_packs_into_any_format(dtype):
    spec = model_spec()
    weights = SpecWeights(spec, dtype)
    for layout, name in PACKINGS:
        plan = make(spec, name, layout=layout)
        matrix = plan.matrix("qkv", 1)
        expected = quantised(source(weights, matrix), name)
        assert np.array_equal(unpack(plan, packed(plan, weights), matrix), expected)


def test_projections_of_different_types_share_a_matrix():
    spec = model_spec()
    weights = SpecWeights(spec)
    weights.changed["k_proj", 0] = weights.tensor("k_proj", 0).astype(np.float32) + 2**-20
    plan = make(spec, "f32")
    expected = source(weights, plan.matrix("qkv", 0))
    assert np.array_equal(unpack(plan, packed(plan, weights), plan.matrix("qkv", 0)), expected)


def test_every_row_of_every_matrix_is_released_once(monkeypatch):
    monkeypatch.setattr(pack_module, "JOB_WEIGHTS", 1 << 11)
    spec = model_spec()
    weights = SpecWeights(spec)
    packed(make(spec), weights)
    released = Counter(
        (role, layer, row)
        for role, layer, first, count in weights.released
        for row in range(first, first + count)
    )
    layers = [(role, i) for i, la in enumerate(spec.layers) for role in layer_roles(la)]
    roles = layers + [(role, -1) for role in (*model_roles(spec), "lm_head")]
    expected = {
        (role, layer, row)
        for role, layer in roles
        if len(shape := role_shape(spec, role, layer)) == 2
        for row in range(shape[0])
    }
    assert released == Counter(expected)


def test_progress_grows_to_the_whole_and_a_failing_source_stops_the_work():
    plan, seen = make(), []
    image = np.zeros(plan.image_bytes, np.uint8)
    pack(plan, SpecWeights(plan.spec), image, lambda *report: seen.append(report))
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == sum(m.nbytes for m in plan.matrices)

    class Failing(SpecWeights):
        def tensor(self, role, layer=-1):
            if role == "o_proj":
                raise CheckpointError("o_proj is missing")
            return super().tensor(role, layer)

    with pytest.raises(CheckpointError, match="o_proj is missing"):
        pack(plan, Failing(plan.spec), image)


def test_an_image_of_the_wrong_size_is_refused():
    plan = make()
    with pytest.raises(ValueError, match="the plan needs"):
        pack(plan, SpecWeights(plan.spec), np.zeros(plan.image_bytes - 1, np.uint8))
