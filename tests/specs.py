"""Small models and machines for tests of the planner, and weights of the right shapes."""

import hashlib

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from flashformer.model.roles import role_shape
from flashformer.model.spec import LayerSpec, ModelSpec, RopeSpec
from flashformer.plan.machine import Machine
from flashformer.plan.pack import pack
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import CHOICES
from flashformer.quant.layout import PANEL_FORMATS

LAYOUT_FORMATS = {
    "rows": CHOICES,
    "panel": tuple(name for name in CHOICES if name in PANEL_FORMATS),
    "fragment": tuple(name for name in CHOICES if name != "f32"),
}
PACKINGS = [(layout, name) for layout, names in LAYOUT_FORMATS.items() for name in names]


def layer_spec(**changes):
    fields = {
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "intermediate_size": 44,
        "rope_idx": 0,
        "window": 0,
        "qk_norm": False,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "attention_scale": 12**-0.5,
    }
    return LayerSpec(**{**fields, **changes})


def model_spec(layers=None, **changes):
    fields = {
        "model_type": "llama",
        "hidden_size": 40,
        "vocab_size": 71,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "layers": layers or (layer_spec(), layer_spec()),
        "ropes": (RopeSpec("default", 10000.0, 12, 128),),
    }
    return ModelSpec(**{**fields, **changes})


def machine(**changes):
    fields = {
        "kind": "cpu",
        "name": "test",
        "arch": "scalar",
        "num_ctas": 3,
        "layout": "panel",
        "page_tokens": 8,
        "kv_format": "f32",
        "max_rows": 64,
    }
    return Machine(**{**fields, **changes})


def plan_of(spec=None, weight_format="bf16", head_format=None, context=64, batch=8, **changes):
    options = PlanOptions(weight_format, head_format or weight_format, context, batch)
    return make_plan(spec or model_spec(), machine(**changes), options)


def packed(plan, weights=None):
    """The image, over memory that was not zero before."""
    image = np.full(plan.image_bytes, 0xA5, np.uint8)
    pack(plan, weights or SpecWeights(plan.spec), image)
    return image


class SpecWeights:
    """Random weights of a spec's shapes; the same role, layer and seed give the same numbers."""

    def __init__(self, spec, dtype=ml_dtypes.bfloat16, seed=0):
        self.spec, self.dtype, self.seed = spec, dtype, seed
        self.fingerprint = f"spec-weights-{seed}"
        self.changed = {}
        self.released = []

    def tensor(self, role, layer=-1):
        if (role, layer) in self.changed:
            return self.changed[role, layer]
        if role == "lm_head" and self.spec.tie_word_embeddings:
            role = "embed_tokens"
        shape = role_shape(self.spec, role, layer)
        digest = hashlib.sha256(f"{self.seed} {role} {layer}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        values = random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        return (values + 1 if role.endswith("norm") else values).astype(self.dtype)

    def release(self, role, layer=-1, first_row=0, num_rows=None):
        self.released.append((role, layer, first_row, num_rows))


layer_specs = st.builds(
    lambda kv_heads, group, head_dim, **fields: layer_spec(
        num_kv_heads=kv_heads, num_q_heads=kv_heads * group, head_dim=2 * head_dim, **fields
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(6, 20),
    intermediate_size=st.integers(1, 90),
    rope_idx=st.integers(-1, 0),
    window=st.sampled_from([0, 1, 17]),
    qk_norm=st.booleans(),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    mlp_bias=st.booleans(),
)
model_specs = st.builds(
    model_spec,
    layers=st.lists(layer_specs, min_size=1, max_size=3).map(tuple),
    hidden_size=st.integers(1, 150),
    vocab_size=st.integers(1, 100),
    tie_word_embeddings=st.booleans(),
)
packings = st.sampled_from(PACKINGS)
