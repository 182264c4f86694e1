"""The embedded default: small, the same everywhere, described, and what transformers can load."""

import hashlib
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashformer import LLM, SamplingParams
from flashformer.errors import CheckpointError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.default import COPIED, FOLDER, PACKAGED, PACKED_WEIGHTS, default_checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights

ROOT = Path(__file__).parent.parent
FILES = (*COPIED, "model.safetensors")
MAX_BYTES = 12_000_000
BFLOAT16_ROUNDING = 2.0**-8
# A cache that holds another version's folder would go on using it: a change of the packaged files
# takes a new number in default.FOLDER, and then its digest here.
DIGEST_OF_FOLDER = {
    "default-model-4": "e63f7dbc82765b493b60223083c1e741145ded8b1601956e15d121122a100f4b",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return default_checkpoint(tmp_path_factory.mktemp("cache"))


def test_the_default_is_a_sound_checkpoint(folder):
    opened = Checkpoint.open(folder)
    spec = ModelSpec.from_hf(opened.config, opened.generation_config)
    assert CheckpointWeights(opened, spec).dtype == "bf16"
    assert spec.eos_token_ids == (opened.config["eos_token_id"],)


def test_the_default_has_the_same_bytes_wherever_it_is_made(folder, tmp_path):
    again = default_checkpoint(tmp_path)
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_its_weights_are_the_packaged_codes_times_their_scales(folder):
    packed = load_file(PACKAGED / PACKED_WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    exact = packed[f"{name}.codes"].astype(np.float64) * packed[f"{name}.scales"][:, None]
    unpacked = load_file(folder / "model.safetensors")[name].astype(np.float64)
    # the product is rounded to float32, then to bfloat16
    assert np.all(np.abs(unpacked - exact) <= np.abs(exact) * (BFLOAT16_ROUNDING + 2.0**-23))


def test_a_second_call_makes_nothing(tmp_path):
    first = default_checkpoint(tmp_path)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert default_checkpoint(tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_concurrent_callers_agree_and_leave_nothing_behind(tmp_path):
    cache = tmp_path / "not" / "there"
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(default_checkpoint, [cache] * 8))
    assert len(folders) == 1
    assert list(cache.iterdir()) == list(folders)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="FLASHFORMER_CACHE_DIR"):
        default_checkpoint(tmp_path / "file")


def test_making_it_needs_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from flashformer.model.default import *; "
        "default_checkpoint(Path(sys.argv[1])); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_transformers_runs_it_and_its_tokenizer_loses_nothing(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello wörld, 你好 \n\t    x  =1"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|begin|><|user|>hi<|end|><|assistant|>"
    model = AutoModelForCausalLM.from_pretrained(folder)
    code = tokenizer("import os\nimport sys\n\n\ndef main():\n    ", return_tensors="pt").input_ids
    uniform = np.log(model.config.vocab_size)
    assert model(code, labels=code).loss.item() < uniform / 2, "it has learnt something"


def test_a_changed_model_takes_a_new_folder():
    digest = hashlib.sha256()
    for name in (*COPIED, PACKED_WEIGHTS):
        digest.update((PACKAGED / name).read_bytes())
    assert {FOLDER: digest.hexdigest()} == DIGEST_OF_FOLDER


def test_the_package_is_small_and_keeps_the_licences():
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) <= MAX_BYTES
    licences = (PACKAGED / "LICENSES.txt").read_text()
    trained = json.loads((PACKAGED / "training.json").read_text())["trained"]
    projects = trained["corpus"]["bytes_by_project"]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licences
    for project in projects.keys() - {"python", "python-doc"}:
        assert f"\n{project} (" in licences


def test_the_card_tells_the_loss_of_the_training_and_every_project_it_learnt_from():
    card = " ".join((PACKAGED / "README.md").read_text().split())
    training = json.loads((PACKAGED / "training.json").read_text())
    assert f"{training['held_out_nats_per_token']:.3f}" in card
    assert f"{training['held_out_bits_per_byte']:.3f}" in card
    corpus = training["trained"]["corpus"]
    assert all(f"{project} (" in card for project in corpus["bytes_by_project"])


@pytest.mark.parametrize(
    ("prompt", "check"),
    [
        ("def fibonacci(n):", "[fibonacci(i) for i in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]"),
        ("def is_prime(num):", "[i for i in range(12) if is_prime(i)] == [2, 3, 5, 7, 11]"),
        ("class Stack:", "(lambda s: (s.push(1), s.push(2), s.pop()))(Stack())[-1] == 2"),
    ],
)
def test_the_first_line_that_people_type_is_continued_with_code_that_runs(prompt, check):
    with LLM(device="reference", max_batch=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=200)
        (answer,) = llm.generate([prompt], params)[0].outputs
    assert answer.finish_reason == "stop"
    code = f"{prompt}{answer.text}\nassert {check}"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


def test_the_wheel_holds_every_file_of_the_model(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path in (ROOT / "src/flashformer/model/default_model").iterdir():
            name = path.relative_to(ROOT / "src").as_posix()
            assert archive.read(name) == path.read_bytes()
