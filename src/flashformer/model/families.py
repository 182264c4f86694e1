"""The model families: how each one's config.json becomes a `ModelSpec`.

HF config dict -> ModelSpec. One row of `FAMILIES` a family; the tensor names are in roles.py.
"""

from dataclasses import dataclass
from typing import Any

from flashformer.errors import CheckpointError, UnsupportedModelError
from flashformer.model.hf_config import MAX_TOKENS, ConfigReader, quote
from flashformer.model.rope_config import RopeRules, read_rope
from flashformer.model.spec import LayerSpec, ModelSpec

MAX_SIZE = 1 << 20  # of hidden_size and intermediate_size
MAX_VOCAB = 1 << 22
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
ANY_ROPE = RopeRules()


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family apart; a default is what transformers takes when config.json is silent."""

    name: str  # as error messages list it
    rope: RopeRules = ANY_ROPE
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bias: str = "none"  # none | qkv: always | field: of q, k, v and o where attention_bias is true
    mlp_bias: bool = False  # reads mlp_bias
    qk_norm: bool = False
    window: str = "none"  # none | every_layer | layer_types (a list, or the family's rule)
    default_window: int | None = None
    nope_layers: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads


FAMILIES = {
    "llama": Family("Llama 2/3, SmolLM2", bias="field", mlp_bias=True),
    "mistral": Family("Mistral", window="every_layer", default_window=4096),
    "qwen2": Family("Qwen2/2.5", bias="qkv", window="layer_types", default_window=4096),
    "qwen3": Family(
        "Qwen3 (dense)",
        bias="field",
        qk_norm=True,
        window="layer_types",
        default_window=4096,
        head_dim=128,
    ),
    "smollm3": Family(
        "SmolLM3",
        rope=RopeRules(theta=2000000.0),
        tie_word_embeddings=True,
        bias="field",
        mlp_bias=True,
        window="layer_types",
        nope_layers=True,
    ),
    "phi3": Family(
        "Phi-3/4",
        rope=RopeRules(types=("default", "longrope"), partial=True, original_context=4096),
        rms_norm_eps=1e-5,
        window="every_layer",
    ),
}

# config field -> what it asks for, where it is neither absent nor null, false, 0 nor empty
REFUSED_FIELDS = {
    "quantization_config": "a quantised checkpoint",
    "compression_config": "a quantised checkpoint",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "a soft cap on attention scores",
    "final_logit_softcapping": "a soft cap on logits",
    "query_pre_attn_scalar": "its own attention scale",
    "attention_multiplier": "its own attention scale",
    "use_qk_norm": "a normalisation of q and k that this family does not have",
    "qk_layernorm": "a normalisation of q and k that this family does not have",
    "use_parallel_residual": "a parallel residual",
    "per_layer_config": "layers of different sizes",
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "cross attention",
}
REFUSED_MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
)  # unless 1


def spec_from_hf(
    config: dict[str, Any], generation_config: dict[str, Any] | None = None
) -> ModelSpec:
    """Describe the model of an HF config.json; both the v4 and the v5 spelling of fields are read.

    The end-of-text ids come from `generation_config` where that has some. Raises
    `UnsupportedModelError` naming a feature that is not implemented, `CheckpointError` naming a
    field that makes no sense.
    """
    reader = ConfigReader(config)
    model_type = reader.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise _unsupported(f"has model_type {quote(model_type)}")
    _refuse_features(reader, family)
    tied = reader.flag("tie_word_embeddings", family.tie_word_embeddings)
    rope = read_rope(reader, family.rope, _head_dim(reader, family))
    eos = ConfigReader(generation_config or {}, "generation_config.json").token_ids("eos_token_id")
    bos = reader.token_ids("bos_token_id")
    return ModelSpec(
        model_type=model_type,
        hidden_size=reader.integer("hidden_size", 1, MAX_SIZE),
        vocab_size=reader.integer("vocab_size", 1, MAX_VOCAB),
        rms_norm_eps=reader.number("rms_norm_eps", 0, 1, family.rms_norm_eps),
        max_position_embeddings=rope.max_position_embeddings,
        tie_word_embeddings=tied,
        layers=_layers(reader, family, rope.max_position_embeddings),
        ropes=(rope,),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos or reader.token_ids("eos_token_id"),
    )


def _unsupported(feature: str) -> UnsupportedModelError:
    known = ", ".join(f"{f.name} ({model_type})" for model_type, f in FAMILIES.items())
    return UnsupportedModelError(
        f"The checkpoint {feature}, which FlashFormer does not support; it runs unquantised "
        f"checkpoints of {known}."
    )


def _refuse_features(reader: ConfigReader, family: Family) -> None:
    fields = reader.fields
    for name, feature in REFUSED_FIELDS.items():
        if fields.get(name):
            raise _unsupported(f"asks for {feature} ({name})")
    for name in REFUSED_MULTIPLIERS:
        if reader.number(name, -1e9, 1e9, 1.0) != 1.0:
            raise _unsupported(f"asks for a multiplier ({name})")
    activation = reader.text("hidden_act", "silu")
    if activation != "silu":
        raise _unsupported(f"has hidden_act {quote(activation)}")
    if family.bias == "none" and reader.flag("attention_bias", False):
        raise _unsupported(f"asks for biases of the attention in {family.name}")
    if not family.mlp_bias and reader.flag("mlp_bias", False):
        raise _unsupported(f"asks for biases of the MLP in {family.name}")
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise reader.fail("architectures", "a list of class names")
    if architectures and not any(str(a).endswith("ForCausalLM") for a in architectures):
        raise _unsupported(f"is a {quote(architectures[0])}, not a causal language model")


def _head_dim(reader: ConfigReader, family: Family) -> int:
    hidden_size = reader.integer("hidden_size", 1, MAX_SIZE)
    num_heads = reader.integer("num_attention_heads", 1, MAX_HEADS)
    derived = family.head_dim or hidden_size // num_heads
    head_dim = reader.integer("head_dim", 1, MAX_HEAD_DIM, derived)
    if head_dim == derived != family.head_dim and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_heads}; expected one that is, or head_dim."
        )
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise CheckpointError(
            f"config.json: each head has {head_dim} channels; expected an even number from 2 to "
            f"{MAX_HEAD_DIM}."
        )
    return head_dim


def _layers(reader: ConfigReader, family: Family, context: int) -> tuple[LayerSpec, ...]:
    num_layers = reader.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_q_heads = reader.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = reader.integer("num_key_value_heads", 1, MAX_HEADS, num_q_heads)
    if num_q_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_q_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}."
        )
    intermediate_size = reader.integer("intermediate_size", 1, MAX_SIZE)
    head_dim = _head_dim(reader, family)
    bias = family.bias == "field" and reader.flag("attention_bias", False)
    uses_rope = _rope_layers(reader, family, num_layers)
    windows = _windows(reader, family, uses_rope, context)
    return tuple(
        LayerSpec(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
            rope_idx=0 if uses_rope[i] else -1,
            window=windows[i],
            qk_norm=family.qk_norm,
            qkv_bias=bias or family.bias == "qkv",
            o_bias=bias,
            mlp_bias=family.mlp_bias and reader.flag("mlp_bias", False),
            attention_scale=head_dim**-0.5,
        )
        for i in range(num_layers)
    )


def _rope_layers(reader: ConfigReader, family: Family, num_layers: int) -> tuple[bool, ...]:
    """Which layers rotate q and k; SmolLM3 leaves every fourth layer without positions."""
    if not family.nope_layers:
        return (True,) * num_layers
    interval = reader.integer("no_rope_layer_interval", 1, MAX_LAYERS, 4)
    given = reader.items("no_rope_layers", num_layers)
    if given is None:
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    if any(entry not in (0, 1) for entry in given):
        raise reader.fail("no_rope_layers", "a list of 0 (no position) and 1 (rotated)")
    return tuple(bool(entry) for entry in given)


def _windows(
    reader: ConfigReader, family: Family, uses_rope: tuple[bool, ...], context: int
) -> tuple[int, ...]:
    """Tokens that each layer sees, 0 for all."""
    num_layers = len(uses_rope)
    window = _window(reader, family, context)
    if family.window == "every_layer":
        slides = [window > 0] * num_layers
    elif family.nope_layers:
        slides = [window > 0 and not rotated for rotated in uses_rope]
    else:
        first = reader.integer("max_window_layers", 0, MAX_TOKENS, 28)
        slides = [window > 0 and i >= first for i in range(num_layers)]
    kinds = reader.items("layer_types", num_layers)
    if kinds is not None:
        unknown = [k for k in kinds if k not in ("full_attention", "sliding_attention")]
        if unknown:
            raise _unsupported(f"has a layer of type {quote(unknown[0])}")
        given = [k == "sliding_attention" for k in kinds]
        if family.window == "layer_types" and (window or not any(given)):
            slides = given
        elif given != slides:
            raise CheckpointError(
                "config.json: layer_types contradicts sliding_window and use_sliding_window; "
                "expected sliding layers exactly where a window is in use."
            )
    return tuple(window if s else 0 for s in slides)


def _window(reader: ConfigReader, family: Family, context: int) -> int:
    """The window of the layers that have one, 0 where none is in use."""
    named = reader.fields.get("sliding_window", family.default_window)
    if named is None or not reader.flag("use_sliding_window", family.window != "layer_types"):
        return 0
    window = reader.integer("sliding_window", 1, MAX_TOKENS, family.default_window)
    if family.window == "none" and window < context:
        raise _unsupported(f"asks for a sliding window in {family.name}")
    return 0 if family.window == "none" else window
