"""Tiny random checkpoints of every family, written by transformers as a user would find them.

`make_checkpoint(folder, "llama-yarn")` -> folder with config, weights and tokenizer.
"""

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 321
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = (
    "One token takes one launch, and the weights stream without a pause. "
    "Der schnelle Fuchs springt; el zorro veloz salta; быстрая лиса прыгает. "
    "A stage ends where its last tile ends, and the next stage waits for it. "
)

# Odd sizes on purpose: rows, columns and heads that are no multiple of a tile, a block, a vector.
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters},
    }


LLAMA = {"model_type": "llama", **BASE, "head_dim": 20}
MISTRAL = {"model_type": "mistral", **BASE, "head_dim": 16}
QWEN2 = {"model_type": "qwen2", **BASE, "tie_word_embeddings": True}
QWEN3 = {"model_type": "qwen3", **BASE, "head_dim": 24, "tie_word_embeddings": True}
SMOLLM3 = {"model_type": "smollm3", **BASE, "num_hidden_layers": 4, "tie_word_embeddings": True}
# phi3 has no head_dim of its own: 80 / 4 gives heads of 20 channels, of which 0.8 can be rotated
PHI3 = {"model_type": "phi3", **BASE, "hidden_size": 80, "num_attention_heads": 4}
LONGROPE = _rope(
    "longrope",
    long_factor=[1.0, 1.3, 2.0, 3.1, 4.2, 5.0, 6.5, 8.0],
    short_factor=[1.0, 1.0, 1.05, 1.1, 1.1, 1.2, 1.3, 1.4],
    partial_rotary_factor=0.8,
)

# name -> (config of the model, dtype of the weights, largest shard)
VARIANTS: dict[str, tuple[dict[str, Any], str, str]] = {
    name: (config, "bfloat16", "1GB")
    for name, config in {
        "llama": LLAMA,
        "llama-tied": LLAMA | {"tie_word_embeddings": True},
        "llama-linear": LLAMA | _rope("linear", factor=4.0),
        "llama-dynamic": LLAMA | {"max_position_embeddings": 64} | _rope("dynamic", factor=2.0),
        "llama-llama3": LLAMA
        | _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        "llama-yarn": LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=128),
        "llama-bias": LLAMA | {"attention_bias": True, "mlp_bias": True},
        "mistral": MISTRAL | {"sliding_window": None},
        "mistral-window": MISTRAL | {"sliding_window": 17},
        "qwen2": QWEN2,
        "qwen2-window": QWEN2
        | {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
        "qwen3": QWEN3,
        "smollm3": SMOLLM3,
        "phi3": PHI3 | {"original_max_position_embeddings": 512},
        "phi3-longrope": PHI3 | {"original_max_position_embeddings": 64} | LONGROPE,
        "phi3-window": PHI3 | {"sliding_window": 19, "original_max_position_embeddings": 512},
    }.items()
} | {
    "llama-f16": (LLAMA, "float16", "1GB"),
    "llama-f32": (LLAMA, "float32", "1GB"),
    "llama-sharded": (LLAMA, "bfloat16", "100KB"),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")


def make_checkpoint(folder: Path, variant: str, seed: int = 0, **overrides: Any) -> Path:
    """Write the checkpoint of a row of VARIANTS; `overrides` replace fields of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields, dtype, shard_size = VARIANTS[variant]
    model_type, fields = fields["model_type"], {**fields, **overrides}
    del fields["model_type"]
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    return folder


def _randomise(name: str, parameter: Any) -> None:
    """Sizes that let every path act: spread logits, sharp attention, uneven norms, large biases."""
    if "norm" in name:
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("bias"):
        parameter.normal_(0.0, 0.3)
    elif "embed_tokens" in name or "lm_head" in name:
        parameter.normal_(0.0, 0.4)
    else:
        parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens, its configuration and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def edit_config(folder: Path, **changes: object) -> None:
    """Replace fields of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
