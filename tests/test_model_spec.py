"""config.json becomes the right ModelSpec, or one sentence that names what is wrong."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import FAMILIES, VARIANTS
from flashformer.errors import CheckpointError, FlashFormerError, UnsupportedModelError
from flashformer.model.roles import layer_roles, model_roles, role_shape
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# Parameters of the published checkpoints, as the hub counts them.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b": 7_248_023_552,
    "phi-4-mini": 3_836_021_760,
    "tinyllama-1.1b": 1_100_048_384,
}


def config_of(variant, **fields):
    return {**VARIANTS[variant][0], **fields}


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def num_parameters(spec):
    shapes = [role_shape(spec, role) for role in model_roles(spec)]
    for i, layer in enumerate(spec.layers):
        shapes += [role_shape(spec, role, i) for role in layer_roles(layer)]
    return sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_shape_has_as_many_parameters_as_the_published_model(name):
    assert num_parameters(ModelSpec.from_hf(SHAPES[name])) == PARAMETERS[name]


def test_llama_3_2_is_read_in_full():
    spec = ModelSpec.from_hf(SHAPES["llama-3.2-1b"])
    layer = spec.layers[0]
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (16, 2048, 128256)
    assert (layer.num_q_heads, layer.num_kv_heads, layer.head_dim) == (32, 8, 64)
    assert (layer.q_rows, layer.kv_rows, layer.qkv_rows) == (2048, 512, 3072)
    assert layer.attention_scale == 0.125
    assert (spec.tie_word_embeddings, spec.rms_norm_eps) == (True, 1e-5)
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert dict(spec.ropes[0].parameters)["factor"] == 32.0


@pytest.mark.parametrize(
    ("family", "qkv_bias", "qk_norm"),
    [
        ("llama", False, False),
        ("mistral", False, False),
        ("qwen2", True, False),
        ("qwen3", False, True),
        ("smollm3", False, False),
        ("phi3", False, False),
    ],
)
def test_families_differ_in_bias_and_norm(family, qkv_bias, qk_norm):
    layers = ModelSpec.from_hf(config_of(family)).layers
    assert {(y.qkv_bias, y.qk_norm, y.o_bias) for y in layers} == {(qkv_bias, qk_norm, False)}


def test_biases_follow_the_fields_that_ask_for_them():
    for family in ("llama", "qwen3", "smollm3"):
        layer = ModelSpec.from_hf(config_of(family, attention_bias=True)).layers[0]
        assert (layer.qkv_bias, layer.o_bias, layer.mlp_bias) == (True, True, False)
    for family in ("llama", "smollm3"):
        assert ModelSpec.from_hf(config_of(family, mlp_bias=True)).layers[0].mlp_bias


def test_smollm3_leaves_every_fourth_layer_without_positions():
    spec = ModelSpec.from_hf(SHAPES["smollm3-3b"])
    assert [i for i, y in enumerate(spec.layers) if y.rope_idx < 0] == list(range(3, 36, 4))
    given = ModelSpec.from_hf(config_of("smollm3", no_rope_layers=[0, 1, 1, 0]))
    assert [y.rope_idx for y in given.layers] == [-1, 0, 0, -1]


def test_windows_slide_on_the_layers_that_the_family_says():
    def windows(variant, **fields):
        return [y.window for y in ModelSpec.from_hf(config_of(variant, **fields)).layers]

    assert windows("mistral-window") == [17, 17]
    assert windows("mistral") == [0, 0]
    assert windows("phi3-window") == [19, 19]
    assert windows("qwen2-window") == [0, 13]
    assert windows("qwen2-window", use_sliding_window=False) == [0, 0]
    kinds = ["sliding_attention", "full_attention"]
    assert windows("qwen2-window", layer_types=kinds) == [13, 0]
    assert windows("smollm3", use_sliding_window=True, sliding_window=9) == [0, 0, 0, 9]
    silent = without(config_of("mistral"), "sliding_window")
    assert ModelSpec.from_hf(silent).layers[0].window == 4096  # what transformers takes


def test_the_v4_and_the_v5_spelling_of_rope_mean_the_same():
    plain = without(SHAPES["llama-3.2-1b"], "rope_theta", "rope_scaling")
    old = plain | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    older = plain | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    new = plain | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    assert ModelSpec.from_hf(old) == ModelSpec.from_hf(older) == ModelSpec.from_hf(new)
    assert ModelSpec.from_hf(new).ropes[0].rope_theta == 5e5


@pytest.mark.parametrize("empty", [{}, {"rope_scaling": None}, {"rope_parameters": None}])
def test_absent_rope_parameters_mean_the_default(empty):
    rope = ModelSpec.from_hf(config_of("llama") | empty).ropes[0]
    assert (rope.rope_type, rope.rope_theta, rope.rotary_dim) == ("default", 10000.0, 20)


def test_a_missing_head_dim_is_derived():
    llama = without(config_of("llama"), "head_dim")
    assert ModelSpec.from_hf(llama).layers[0].head_dim == 12
    assert ModelSpec.from_hf(llama | {"head_dim": None}).layers[0].head_dim == 12
    assert ModelSpec.from_hf(without(config_of("qwen3"), "head_dim")).layers[0].head_dim == 128


def test_end_of_text_ids_prefer_the_generation_config():
    config = config_of("llama", eos_token_id=[1, 5, 1])
    assert ModelSpec.from_hf(config).eos_token_ids == (1, 5)
    assert ModelSpec.from_hf(config, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert ModelSpec.from_hf(config, {"temperature": 1}).eos_token_ids == (1, 5)
    assert ModelSpec.from_hf(without(config, "eos_token_id")).eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "gemma3_text"}, "gemma3_text"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"final_logit_softcapping": 30.0}, "soft cap"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "each layer type"),
        ({"sliding_window": 128}, "sliding window"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, names):
    with pytest.raises(UnsupportedModelError, match=names):
        ModelSpec.from_hf(config_of("llama") | fields)


@pytest.mark.parametrize(
    ("family", "field"),
    [("mistral", "attention_bias"), ("phi3", "attention_bias"), ("qwen2", "mlp_bias")],
)
def test_a_bias_that_the_family_lacks_is_refused(family, field):
    with pytest.raises(UnsupportedModelError, match="bias"):
        ModelSpec.from_hf(config_of(family, **{field: True}))


def test_an_unknown_model_type_is_told_what_is_supported():
    with pytest.raises(UnsupportedModelError) as caught:
        ModelSpec.from_hf({"model_type": "mamba2"})
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"hidden_size": -3}, "hidden_size"),
        ({"hidden_size": 71}, "hidden_size"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**18}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "usable"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(fields, names):
    config = without(config_of("llama"), "head_dim") | fields
    with pytest.raises(CheckpointError, match=names):
        ModelSpec.from_hf(config)


def test_longrope_factors_must_fit_the_rotated_channels():
    config = copy.deepcopy(config_of("phi3-longrope"))
    config["rope_parameters"]["long_factor"].append(1.0)
    with pytest.raises(CheckpointError, match="long_factor"):
        ModelSpec.from_hf(config)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["", "default", "yarn", "full_attention", "silu", "\0", "x" * 300]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "type", "rope_theta"]), inner)
    ),
    max_leaves=6,
)
FIELDS = [
    *sorted({name for config in SHAPES.values() for name in config}),
    "hidden_act",
    "layer_types",
    "sliding_window",
    "no_rope_layers",
    "no_rope_layer_interval",
    "max_window_layers",
    "partial_rotary_factor",
    "architectures",
    "rope_parameters",
]
ROPE_FIELDS = [
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "long_factor",
    "partial_rotary_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "attention_factor",
]


def assert_one_sentence(error):
    text = str(error)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(VARIANTS)),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=2),
    st.dictionaries(st.sampled_from(ROPE_FIELDS), JSON_VALUES, max_size=2),
)
def test_a_mutated_config_is_read_or_refused_with_one_sentence(variant, fields, rope_fields):
    config = json.loads(json.dumps(config_of(variant)))
    if rope_fields:
        config["rope_parameters"] = {**config.get("rope_parameters", {}), **rope_fields}
    config.update(fields)
    try:
        spec = ModelSpec.from_hf(config)
    except FlashFormerError as error:
        assert_one_sentence(error)
    else:
        hash(spec)  # a spec is a key of caches
        assert num_parameters(spec) > 0
