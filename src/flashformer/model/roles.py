"""Which tensor of a checkpoint plays which role, and the shape it must have.

ModelSpec, role, layer -> `TensorPart`. Roles are listed in weights.py.
"""

from dataclasses import dataclass

from flashformer.model.spec import LayerSpec, ModelSpec

MODEL_TENSORS = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
LAYER_TENSORS = {  # after "model.layers.<layer>."
    "input_layernorm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o_proj": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_proj": "mlp.down_proj.weight",
    "down_bias": "mlp.down_proj.bias",
}
# model_type -> tensor that holds the rows of several roles -> these roles, from the first row on
FUSED_TENSORS: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": {
        "self_attn.qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
        "mlp.gate_up_proj.weight": ("gate_proj", "up_proj"),
    }
}


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Rows of one tensor of a checkpoint."""

    name: str  # of the tensor in the file
    tensor_shape: tuple[int, ...]  # of the whole tensor
    first_row: int
    shape: tuple[int, ...]  # of the part


def model_roles(spec: ModelSpec) -> tuple[str, ...]:
    """Roles outside the layers that have a tensor of their own: no `lm_head` in a tied model."""
    return tuple(r for r in MODEL_TENSORS if r != "lm_head" or not spec.tie_word_embeddings)


def layer_roles(layer: LayerSpec) -> tuple[str, ...]:
    """Roles that the layer has."""
    absent: set[str] = set()
    if not layer.qkv_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not layer.o_bias:
        absent |= {"o_bias"}
    if not layer.mlp_bias:
        absent |= {"gate_bias", "up_bias", "down_bias"}
    if not layer.qk_norm:
        absent |= {"q_norm", "k_norm"}
    return tuple(r for r in LAYER_TENSORS if r not in absent)


def role_shape(spec: ModelSpec, role: str, layer: int = -1) -> tuple[int, ...]:
    """Shape of a role; `layer` is -1 outside the layers. Raises `KeyError` for an unknown role."""
    hidden = spec.hidden_size
    if layer < 0:
        matrix = (spec.vocab_size, hidden)
        return {"embed_tokens": matrix, "lm_head": matrix, "norm": (hidden,)}[role]
    record = spec.layers[layer]
    rows = {
        "q": record.q_rows,
        "k": record.kv_rows,
        "v": record.kv_rows,
        "o": hidden,
        "gate": record.intermediate_size,
        "up": record.intermediate_size,
        "down": hidden,
    }
    cols = {"o": record.q_rows, "down": record.intermediate_size}
    if role in ("input_layernorm", "post_attention_layernorm"):
        return (hidden,)
    what, _, kind = role.partition("_")
    if kind == "proj":
        return (rows[what], cols.get(what, hidden))
    return {"bias": (rows[what],), "norm": (record.head_dim,)}[kind]


def locate(spec: ModelSpec, role: str, layer: int = -1) -> TensorPart:
    """Where a role's weights lie; `lm_head` of a tied model is the embedding."""
    shape = role_shape(spec, role, layer)
    if layer < 0:
        tied = role == "lm_head" and spec.tie_word_embeddings
        return TensorPart(MODEL_TENSORS["embed_tokens" if tied else role], shape, 0, shape)
    prefix = f"model.layers.{layer}."
    for name, members in FUSED_TENSORS.get(spec.model_type, {}).items():
        if role in members:
            rows = [role_shape(spec, member, layer)[0] for member in members]
            first = sum(rows[: members.index(role)])
            return TensorPart(prefix + name, (sum(rows), *shape[1:]), first, shape)
    return TensorPart(prefix + LAYER_TENSORS[role], shape, 0, shape)
