"""A forward pass written from the spec alone gives the logits of transformers.

The pass below knows no family: whatever it needs is in `ModelSpec` and behind a role.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import VARIANTS, make_checkpoint
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights

# float64 here against float32 there: dot products of up to 321 terms in 4 layers round by about
# sqrt(321) x 2^-24 = 1e-6 of the largest logit each; a wrong window or angle is above 1e-2.
TOLERANCE = 2e-5


class PlainForward:
    """All positions at once in float64: logits [len, vocab]."""

    def __init__(self, folder):
        checkpoint = Checkpoint.open(folder)
        self.spec = ModelSpec.from_hf(checkpoint.config, checkpoint.generation_config)
        self.weights = CheckpointWeights(checkpoint, self.spec)

    def weight(self, role, layer=-1):
        return np.asarray(self.weights.tensor(role, layer), np.float32).astype(np.float64)

    def project(self, x, role, layer, biased):
        y = x @ self.weight(f"{role}_proj", layer).T
        return y + self.weight(f"{role}_bias", layer) if biased else y

    def norm(self, x, role, layer=-1):
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.spec.rms_norm_eps) * self.weight(role, layer)

    def rotate(self, x, rope):
        """x [len, heads, head_dim]; a table for just the tokens that there are."""
        frequencies, factor = rope.frequencies(len(x))
        angles = np.arange(len(x))[:, None, None] * frequencies.astype(np.float64)
        cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
        half = rope.rotary_dim // 2
        first, second, rest = np.split(x, [half, 2 * half], axis=-1)
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
        )

    def attention(self, x, i):
        layer = self.spec.layers[i]
        heads = {"q": layer.num_q_heads, "k": layer.num_kv_heads, "v": layer.num_kv_heads}
        q, k, v = (
            self.project(x, role, i, layer.qkv_bias).reshape(len(x), count, layer.head_dim)
            for role, count in heads.items()
        )
        if layer.qk_norm:
            q, k = self.norm(q, "q_norm", i), self.norm(k, "k_norm", i)
        if layer.rope_idx >= 0:
            q, k = (self.rotate(part, self.spec.ropes[layer.rope_idx]) for part in (q, k))
        group = layer.num_q_heads // layer.num_kv_heads
        scores = np.einsum("qhd,khd->hqk", q, k.repeat(group, axis=1)) * layer.attention_scale
        ages = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (ages >= 0) & (ages < (layer.window or len(x)))
        scores = np.where(seen, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, v.repeat(group, axis=1))
        return self.project(mixed.reshape(len(x), -1), "o", i, layer.o_bias)

    def mlp(self, x, i):
        biased = self.spec.layers[i].mlp_bias
        gate, up = (self.project(x, role, i, biased) for role in ("gate", "up"))
        return self.project(gate / (1 + np.exp(-gate)) * up, "down", i, biased)

    def logits(self, ids):
        x = self.weight("embed_tokens")[ids]
        for i in range(self.spec.num_layers):
            x = x + self.attention(self.norm(x, "input_layernorm", i), i)
            x = x + self.mlp(self.norm(x, "post_attention_layernorm", i), i)
        return self.norm(x, "norm") @ self.weight("lm_head").T


def assert_same_logits(folder, length):
    forward = PlainForward(folder)
    ids = (np.arange(length) * 7 + 3) ** 2 % forward.spec.vocab_size
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()
    error = np.abs(forward.logits(ids) - expected).max()
    assert error <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_spec_says_all_that_a_forward_pass_needs(checkpoint, variant):
    assert_same_logits(checkpoint(variant), 130)


@pytest.mark.parametrize("variant", ["llama-dynamic", "phi3-longrope"])
def test_tables_that_depend_on_the_length_are_right_below_the_original_length(checkpoint, variant):
    assert_same_logits(checkpoint(variant), 30)


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
        ("smollm3", {"no_rope_layers": [0, 1, 0, 1], "attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
        ("qwen2-window", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("llama", {"num_key_value_heads": 6}),
        ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 0.01}),
    ],
)
def test_rarer_fields_are_read_as_transformers_reads_them(tmp_path, variant, fields):
    assert_same_logits(make_checkpoint(tmp_path, variant, **fields), 40)
