"""Rotary tables equal those of transformers, on both sides of every length that matters."""

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flashformer.model.rope import ROPE_TYPES
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec

# The longest chain of float32 operations (yarn) rounds ten times, by 2^-24 each.
RTOL = 10 * 2.0**-24

LLAMA = {
    "hidden_size": 72,
    "intermediate_size": 200,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "vocab_size": 321,
    "max_position_embeddings": 512,
}
FACTORS = {
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0],
    "short_factor": [1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.4, 1.5],
}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "llama3 without an original length": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    "yarn with its own attention factor and betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn with equal betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 4.0,
        "beta_slow": 4.0,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        **FACTORS,
    },
    "longrope with its own attention factor": {
        "rope_type": "longrope",
        "factor": 4.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 128,
        **FACTORS,
    },
}
CONTEXTS = (1, 127, 128, 129, 511, 512, 513, 4096)


def theirs(config, context):
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=context)


def assert_same_table(spec, config, context):
    expected, expected_factor = theirs(config, context)
    table, factor = spec.ropes[0].frequencies(context)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected.numpy(), rtol=RTOL, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("theta", [10000.0, 150000.0])
def test_every_rope_type_has_the_frequencies_of_transformers(case, context, theta):
    config = LlamaConfig(**LLAMA, rope_parameters={"rope_theta": theta, **CASES[case]})
    assert_same_table(ModelSpec.from_hf(config.to_dict()), config, context)


def test_every_rope_type_is_tested():
    assert {case["rope_type"] for case in CASES.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize("name", SHAPES)
def test_known_models_have_the_frequencies_of_transformers(name):
    fields = dict(SHAPES[name])
    model_type = fields.pop("model_type")
    spec = ModelSpec.from_hf(SHAPES[name])
    config = AutoConfig.for_model(model_type, **fields)
    config.head_dim = spec.layers[0].head_dim
    for context in (4096, 4097):
        assert_same_table(spec, config, context)


def test_dynamic_tables_stretch_only_beyond_the_trained_length():
    config = LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 1e4, **CASES["dynamic"]})
    rope = ModelSpec.from_hf(config.to_dict()).ropes[0]
    short, trained, longer = (rope.frequencies(n)[0] for n in (1, 512, 1024))
    assert (short == trained).all()
    assert (longer[1:] < trained[1:]).all()


def test_longrope_changes_its_factors_just_above_the_original_length():
    config = LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 1e4, **CASES["longrope"]})
    rope = ModelSpec.from_hf(config.to_dict()).ropes[0]
    plain = 1e4 ** -(np.arange(0, 20, 2) / 20)
    for context, which in ((128, "short_factor"), (129, "long_factor")):
        expected = plain / np.array(FACTORS[which])
        np.testing.assert_allclose(rope.frequencies(context)[0], expected, rtol=1e-6)


def test_phi3_reads_the_original_length_beside_its_rope_parameters():
    fields = dict(SHAPES["phi-4-mini"])
    inside = dict(fields["rope_scaling"], original_max_position_embeddings=999)
    rope = ModelSpec.from_hf(dict(fields, rope_scaling=inside)).ropes[0]
    assert dict(rope.parameters)["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_all_names_of_longrope_in_phi3_mean_the_same(name):
    fields = dict(SHAPES["phi-4-mini"])
    scaling = dict(fields["rope_scaling"], type=name)
    assert ModelSpec.from_hf(dict(fields, rope_scaling=scaling)) == ModelSpec.from_hf(fields)
