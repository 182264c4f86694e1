"""Weights by role: every tensor of transformers once, in the right place; random weights alike."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import FAMILIES, VARIANTS, edit_config, make_checkpoint
from flashformer.errors import CheckpointError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.roles import FUSED_TENSORS, layer_roles, locate, model_roles, role_shape
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import LAYER_ROLES, MODEL_ROLES, CheckpointWeights, RandomWeights


def open_weights(folder):
    checkpoint = Checkpoint.open(folder)
    spec = ModelSpec.from_hf(checkpoint.config, checkpoint.generation_config)
    return CheckpointWeights(checkpoint, spec)


def every_role(spec):
    layers = [(role, i) for i, layer in enumerate(spec.layers) for role in layer_roles(layer)]
    return [(role, -1) for role in model_roles(spec)] + layers


def edit_tensors(source, folder, **changes):
    """A copy of a single-file checkpoint with some tensors replaced; None drops one."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: t for name, t in tensors.items() if changes.get(name, t) is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def byte_bounds(array):
    """Addresses of the first byte and after the last that an array of positive strides reads."""
    first = array.__array_interface__["data"][0]
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    return first, first + sum(spans) + array.itemsize


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_roles_name_exactly_the_tensors_of_transformers(checkpoint, variant):
    weights = open_weights(checkpoint(variant))
    parts = [locate(weights.spec, role, layer) for role, layer in every_role(weights.spec)]
    assert {part.name for part in parts} == set(weights.checkpoint.names)
    rows = dict.fromkeys(weights.checkpoint.names, 0)
    for part in sorted(parts, key=lambda part: (part.name, part.first_row)):
        assert part.first_row == rows[part.name]  # parts of one tensor follow without a gap
        rows[part.name] += part.shape[0]
    assert rows == {name: weights.checkpoint.entry(name).shape[0] for name in rows}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_has_the_bits_that_transformers_loads(checkpoint, variant):
    weights = open_weights(checkpoint(variant))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(variant), dtype="auto")
    theirs = model.state_dict()
    for role, layer in every_role(weights.spec):
        part = locate(weights.spec, role, layer)
        expected = theirs[part.name][part.first_row : part.first_row + part.shape[0]]
        tensor = weights.tensor(role, layer)
        assert tensor.shape == part.shape == role_shape(weights.spec, role, layer)
        assert (np.asarray(tensor, np.float32) == expected.float().numpy()).all()
        assert not tensor.flags.writeable


def test_fused_projections_are_cut_where_phi3_cuts_its_activations(checkpoint):
    weights = open_weights(checkpoint("phi3"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint("phi3"), dtype=torch.float32)
    x = torch.randn(1, 80)
    layer = model.model.layers[1]
    seen = {}
    layer.self_attn.qkv_proj.register_forward_hook(lambda m, i, o: seen.update(qkv=o))
    layer.mlp.gate_up_proj.register_forward_hook(lambda m, i, o: seen.update(gate_up=o))
    layer.mlp.down_proj.register_forward_hook(lambda m, i, o: seen.update(product=i[0]))
    layer.mlp(x)
    ours = {r: np.asarray(weights.tensor(r, 1), np.float32) for r in ("gate_proj", "up_proj")}
    gate, up = (x.numpy() @ ours[r].T for r in ("gate_proj", "up_proj"))
    product = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(product, seen["product"].detach().numpy(), rtol=1e-4, atol=1e-5)
    qkv = layer.self_attn.qkv_proj(x).detach().numpy()
    heads = {"q_proj": qkv[:, :80], "k_proj": qkv[:, 80:120], "v_proj": qkv[:, 120:]}
    for role, expected in heads.items():
        mine = x.numpy() @ np.asarray(weights.tensor(role, 1), np.float32).T
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_every_role_of_the_list_is_known_to_the_table():
    layer = ModelSpec.from_hf(VARIANTS["llama-bias"][0]).layers[0]
    normed = ModelSpec.from_hf(VARIANTS["qwen3"][0]).layers[0]
    assert {*layer_roles(layer), *layer_roles(normed)} == set(LAYER_ROLES)
    assert set(model_roles(ModelSpec.from_hf(VARIANTS["llama"][0]))) == set(MODEL_ROLES)
    assert {role for fused in FUSED_TENSORS["phi3"].values() for role in fused} < set(LAYER_ROLES)


@pytest.mark.parametrize(("variant", "dtype"), [("llama", "bf16"), ("llama-f16", "f16")])
def test_the_format_of_a_checkpoint_is_that_of_its_projections(checkpoint, variant, dtype):
    assert open_weights(checkpoint(variant)).dtype == dtype


def test_a_tied_head_is_the_embedding_whatever_the_file_holds(checkpoint, tmp_path):
    other = torch.zeros(321, 72, dtype=torch.bfloat16)
    folder = edit_tensors(checkpoint("llama-tied"), tmp_path / "c", **{"lm_head.weight": other})
    weights = open_weights(folder)
    assert (weights.tensor("lm_head") == weights.tensor("embed_tokens")).all()
    assert weights.tensor("lm_head").any()


def test_an_untied_model_without_a_head_is_refused(checkpoint, tmp_path):
    folder = edit_tensors(checkpoint("llama"), tmp_path / "c", **{"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        open_weights(folder)


def test_a_table_of_frequencies_in_an_old_checkpoint_is_ignored(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    open_weights(edit_tensors(checkpoint("llama"), tmp_path / "c", **{name: torch.ones(10)}))


def test_a_tensor_that_the_config_does_not_describe_is_refused(checkpoint, tmp_path):
    name = "model.layers.1.self_attn.q_proj.bias"
    folder = edit_tensors(checkpoint("llama"), tmp_path / "c", **{name: torch.ones(120)})
    with pytest.raises(CheckpointError, match=name):
        open_weights(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = torch.zeros(72, 200, dtype=torch.bfloat16)
    folder = edit_tensors(checkpoint("llama"), tmp_path / "c", **{name: wrong})
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder)
    assert all(part in str(caught.value) for part in (name, "[72, 200]", "[200, 72]"))


def test_a_tensor_of_another_dtype_is_named(checkpoint, tmp_path):
    wrong = torch.zeros(72, dtype=torch.int8)
    folder = edit_tensors(checkpoint("llama"), tmp_path / "c", **{"model.norm.weight": wrong})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I8"):
        open_weights(folder)


def test_norms_may_be_of_another_float_dtype_than_projections(checkpoint, tmp_path):
    norm = torch.full((72,), 0.1)
    folder = edit_tensors(checkpoint("llama"), tmp_path / "c", **{"model.norm.weight": norm})
    assert open_weights(folder).tensor("norm").dtype == np.float32


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"hidden_size": 78},
        {"intermediate_size": 201},
        {"vocab_size": 320},
        {"num_key_value_heads": 3},
        {"head_dim": 18},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "phi3"},
    ],
)
def test_a_config_that_disagrees_with_the_weights_is_refused(copied, fields):
    edit_config(copied, **fields)
    with pytest.raises(CheckpointError, match=r"tensor|shape|holds"):
        open_weights(copied)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_the_shapes_of_a_checkpoint(family):
    spec = ModelSpec.from_hf(VARIANTS[family][0])
    weights = RandomWeights(spec)
    for role, layer in every_role(spec):
        tensor = weights.tensor(role, layer)
        assert tensor.shape == role_shape(spec, role, layer)
        assert tensor.dtype == ml_dtypes.bfloat16


def test_random_weights_are_those_of_their_seed():
    spec = ModelSpec.from_hf(VARIANTS["llama"][0])
    one, same, other = RandomWeights(spec, 1), RandomWeights(spec, 1), RandomWeights(spec, 2)
    assert (one.tensor("q_proj", 1) == same.tensor("q_proj", 1)).all()
    assert (one.tensor("q_proj", 1) != other.tensor("q_proj", 1)).any()
    assert (one.tensor("q_proj", 1) != one.tensor("q_proj", 0)).any()
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.fingerprint != RandomWeights(spec, 1, "f16").fingerprint


@pytest.mark.parametrize(("dtype", "kind"), [("f16", np.float16), ("f32", np.float32)])
def test_random_weights_come_in_the_dtype_asked_for(dtype, kind):
    spec = ModelSpec.from_hf(VARIANTS["llama"][0])
    assert RandomWeights(spec, dtype=dtype).tensor("norm").dtype == kind


def test_random_weights_of_any_size_are_views_of_one_small_block():
    weights = RandomWeights(ModelSpec.from_hf(SHAPES["llama-3.3-70b"]))
    assert weights.block.nbytes < 40_000_000
    for role, layer in (("embed_tokens", -1), ("down_proj", 79), ("k_proj", 5)):
        tensor = weights.tensor(role, layer)
        (low, high), (first, last) = byte_bounds(tensor), byte_bounds(weights.block)
        assert first <= low < high <= last
        sample = np.asarray(tensor[:: max(1, len(tensor) // 50)], np.float32)
        # the mean of n numbers of std s strays by s / sqrt(n); rows of a sample overlap little
        assert abs(sample.mean()) < 6 * 0.02 / np.sqrt(sample.size)
        assert sample.std() == pytest.approx(0.02, rel=0.02)
    norm = np.asarray(weights.tensor("input_layernorm", 3), np.float32)
    assert 0.5 < norm.min() < norm.max() < 1.5


def test_an_index_may_spread_a_model_over_files(checkpoint):
    whole, sharded = open_weights(checkpoint("llama")), open_weights(checkpoint("llama-sharded"))
    assert len(sharded.checkpoint.files) > 2
    for role, layer in every_role(whole.spec):
        assert (whole.tensor(role, layer) == sharded.tensor(role, layer)).all()


def test_views_agree_with_the_safetensors_library(checkpoint):
    folder = checkpoint("llama-f16")
    opened = Checkpoint.open(folder)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(opened.names)
        for name in opened.names:
            assert (file.get_tensor(name) == opened.tensor(name)).all()


def test_make_checkpoint_is_deterministic(tmp_path, checkpoint):
    again = make_checkpoint(tmp_path / "c", "qwen3")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (checkpoint("qwen3") / name).read_bytes()
