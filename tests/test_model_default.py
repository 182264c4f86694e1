"""The embedded default: built once, the same everywhere, and what transformers can load."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashformer.errors import CheckpointError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.default import BEGIN_ID, END_ID, default_checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return default_checkpoint(tmp_path_factory.mktemp("cache"))


def test_the_default_is_a_sound_checkpoint(folder):
    opened = Checkpoint.open(folder)
    spec = ModelSpec.from_hf(opened.config, opened.generation_config)
    assert CheckpointWeights(opened, spec).dtype == "bf16"
    assert spec.eos_token_ids == (END_ID,)


def test_the_default_has_the_same_bytes_wherever_it_is_built(folder, tmp_path):
    again = default_checkpoint(tmp_path)
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_second_call_builds_nothing(tmp_path):
    first = default_checkpoint(tmp_path)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert default_checkpoint(tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_concurrent_builders_agree_and_leave_nothing_behind(tmp_path):
    cache = tmp_path / "not" / "there"
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(default_checkpoint, [cache] * 8))
    assert len(folders) == 1
    assert list(cache.iterdir()) == list(folders)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="FLASHFORMER_CACHE_DIR"):
        default_checkpoint(tmp_path / "file")


def test_building_it_needs_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from flashformer.model.default import *; "
        "default_checkpoint(Path(sys.argv[1])); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_transformers_runs_it_and_prints_what_its_tokenizer_says(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello wörld, 你好 \n\t"
    ids = tokenizer(text)["input_ids"]
    assert ids == [BEGIN_ID, *text.encode()]
    assert tokenizer.decode(ids[1:]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|begin|><|user|>hi<|end|><|assistant|>"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(tokenizer(text, return_tensors="pt").input_ids).logits.std() > 0.1
