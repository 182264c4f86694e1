"""A trained model -> a checkpoint in HF's layout: bf16 weights, tokenizer, configuration."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer

from chat_format import BEGIN, CHAT_TEMPLATE, END
from llama import Llama

MAX_SHARD = "12MB"  # small enough to carry anywhere


def save(model: Llama, tokenizer_file: Path, out: Path, report: dict[str, Any]) -> None:
    """Write the checkpoint into `out`, and `report` beside it as training.json."""
    state = {name: w.detach().bfloat16().cpu() for name, w in model.state_dict().items()}
    save_torch_state_dict(state, out, max_shard_size=MAX_SHARD)
    shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ends = {
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
    }
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(model.shape),
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            **ends,
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.max_position_embeddings,
        },
        "training.json": report,
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
