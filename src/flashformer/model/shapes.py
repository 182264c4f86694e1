"""Shapes of known models for `bench --model-shape`: HF-style configs, no weights.

Name -> config dict for `spec_from_hf`. The numbers are those of the models' public config.json.
"""

from typing import Any


def _llama3(
    layers: int, hidden: int, intermediate: int, heads: int, factor: float, tied: bool
) -> dict[str, Any]:
    """Llama 3.1 to 3.3: 8 key and value heads, rope type llama3."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 64 if heads * 64 == hidden else 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }


def _qwen(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """Qwen2.5 and Qwen3; the caller adds the vocabulary, the context and the head's size."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "eos_token_id": 151645,
    }


def _smollm2(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """SmolLM2, a Llama."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, 32.0, True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, 32.0, True),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32, 8.0, False),
    "llama-3.3-70b": _llama3(80, 8192, 28672, 64, 8.0, False),
    "qwen3-0.6b": _qwen("qwen3", 28, 1024, 3072, 16, 8)
    | {
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _qwen("qwen3", 36, 4096, 12288, 32, 8)
    | {
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": _qwen("qwen2", 24, 896, 4864, 14, 2)
    | {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "qwen2.5-7b": _qwen("qwen2", 28, 3584, 18944, 28, 4)
    | {"vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False},
    "smollm2-135m": _smollm2(30, 576, 1536, 9, 3),
    "smollm2-360m": _smollm2(32, 960, 2560, 15, 5),
    "smollm3-3b": {
        "model_type": "smollm3",
        "num_hidden_layers": 36,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128012,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "phi-4-mini": {
        "model_type": "phi3",
        "num_hidden_layers": 32,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        # the true factors are fitted numbers; a ramp has the same shape and costs the same
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + i for i in range(48)],
            "short_factor": [1.0] * 48,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
