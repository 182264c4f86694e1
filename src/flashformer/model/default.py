"""The embedded default model: a small random Llama with a byte-level tokenizer.

Cache folder -> checkpoint folder, built once. The text that it generates is noise; whoever offers
it must say so. It exists so that every command runs with nothing downloaded.
"""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flashformer.errors import CheckpointError
from flashformer.model.families import spec_from_hf
from flashformer.model.roles import layer_roles, locate, model_roles

FOLDER = "default-model-1"  # raise the number whenever what is built here changes
SEED = 0
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BEGIN_ID, END_ID = 256, 257  # after the 256 bytes
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "vocab_size": 256 + len(SPECIAL_TOKENS),
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN_ID,
    "eos_token_id": END_ID,
    "torch_dtype": "bfloat16",
}
# Most bytes are no text. Larger head rows make printable ones win, so that noise can be read.
PRINTABLE = range(32, 127)
PRINTABLE_STD, OTHER_STD = 0.2, 0.02


def default_checkpoint(cache_dir: Path) -> Path:
    """The folder of the default checkpoint below `cache_dir`, built there if it is missing.

    Deterministic, needs no network. Concurrent builders are safe: each builds beside the final
    folder and renames; the first wins. Raises `CheckpointError` when the folder cannot be written.
    """
    folder = cache_dir / FOLDER
    if folder.is_dir():
        return folder
    draft = cache_dir / f"{FOLDER}.{uuid.uuid4().hex}"
    try:
        draft.mkdir(parents=True)
        _write_checkpoint(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same bytes
                raise
    except OSError as error:
        raise CheckpointError(
            f"The default model cannot be written to {cache_dir}: {error.strerror}; set "
            "FLASHFORMER_CACHE_DIR to a folder with 10 MB of room."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_checkpoint(folder: Path) -> None:
    generation_config = {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    for name, value in (
        ("config.json", CONFIG),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    _write_weights(folder / "model.safetensors")


def _write_weights(path: Path) -> None:
    from safetensors.numpy import save_file

    spec = spec_from_hf(CONFIG)
    random = np.random.default_rng(SEED)
    places = [locate(spec, role) for role in model_roles(spec)]
    for i, layer in enumerate(spec.layers):
        places += [locate(spec, role, i) for role in layer_roles(layer)]
    tensors = {}
    for place in places:
        values = np.ones(place.shape, np.float32)
        if len(place.shape) == 2:
            std = place.shape[1] ** -0.5  # keeps the size of what passes through
            values = random.standard_normal(place.shape, np.float32) * np.float32(std)
        if place.name == "lm_head.weight":
            rows = np.full((place.shape[0], 1), OTHER_STD, np.float32)
            rows[PRINTABLE] = PRINTABLE_STD
            values = random.standard_normal(place.shape, np.float32) * rows
        tensors[place.name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, path, {"format": "pt"})


def _tokenizer_json() -> str:
    """A token for each byte, its id the byte's value, and the special tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, BEGIN_ID)]
    )
    text: str = tokenizer.to_str()
    return text


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]
