"""Bad input: one sentence on stderr, the right exit code, nothing half-written."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import edit_config

REFERENCE = ("--device", "reference")
RUNTIME, USAGE, UNSUPPORTED, MEMORY = 1, 2, 3, 4


def run(cli, folder, *flags):
    return cli("run", "a stage", "--model", folder, "-n", 2, *REFERENCE, *flags)


def test_a_truncated_checkpoint_is_refused(cli, copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in run(cli, copied).error(UNSUPPORTED)


def test_a_header_that_lies_about_its_length_is_refused(cli, copied):
    path = copied / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "model.safetensors" in run(cli, copied).error(UNSUPPORTED)


def test_an_index_that_leads_outside_is_refused(cli, copied):
    (copied / "model.safetensors").rename(copied.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in run(cli, copied).error(UNSUPPORTED)


def test_an_index_that_names_a_missing_file_is_refused(cli, copied):
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in run(cli, copied).error(UNSUPPORTED)


def test_shapes_that_disagree_with_the_config_are_refused(cli, copied):
    edit_config(copied, intermediate_size=208)
    assert "208" in run(cli, copied).error(UNSUPPORTED)


def test_weights_that_are_not_numbers_are_refused_and_not_cached(cli, copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.nan
    save_file(tensors, path)
    message = run(cli, copied).error(UNSUPPORTED)
    assert "down" in message
    assert cli("cache", "list", "--json").json["entries"] == []
    assert not list(cli.cache.rglob("*.tmp"))


def test_a_missing_tokenizer_is_told_for_a_text_prompt(cli, copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer.json" in run(cli, copied).error(USAGE)


def test_an_unknown_architecture_is_named(cli, copied):
    edit_config(copied, model_type="rwkv")
    assert "rwkv" in run(cli, copied).error(UNSUPPORTED)


def test_a_feature_that_is_not_supported_is_named(cli, copied):
    edit_config(copied, quantization_config={"quant_method": "gptq"})
    assert "quantised" in run(cli, copied).error(UNSUPPORTED)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(cli):
    prompt = "\u00a7" * 100  # at least a token each: no text holds two of them
    message = cli("run", prompt, "--context", 64, *REFERENCE).error(USAGE)
    length, context = (int(n) for n in re.findall(r"\d+", message)[:2])
    assert length > 100
    assert context == 64


def test_a_context_beyond_the_model_is_refused(cli, copied):
    assert "512" in run(cli, copied, "--context", 100_000).error(USAGE)


def test_a_folder_that_does_not_exist_is_named(cli):
    assert "./nothing-here" in run(cli, "./nothing-here").error(UNSUPPORTED)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--temp", "-1"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--top-p", "nan"), "top_p"),
        (("--min-p", "2"), "min_p"),
        (("--seed", "-5"), "seed"),
        (("-n", "0"), "-n"),
        (("-n", "many"), "-n"),
        (("--stop", ""), "stop"),
        (("--quant", "int3"), "int3"),
        (("--quant", "fp8", "--device", "cpu"), "int8, int4, int4g128"),
        (("--threads", "many"), "flashformer run --help"),
        (("--device", "abacus"), "abacus"),
        (("--threads", "0"), "threads"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_named(cli, flags, named):
    assert named in cli("run", "x", *flags).error(USAGE)


def test_no_verb_shows_the_help_and_no_prompt_or_an_unknown_verb_is_wrong_use(cli):
    assert "Usage" in cli().out
    assert "prompt" in cli("run").error(USAGE).lower()
    assert "fly" in cli("fly").error(USAGE)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("-p", "x"), "-p"),
        (("-p", "0", "-n", "0"), "-p"),
        (("-b", "0"), "-b"),
        (("-d", "-1"), "-d"),
        (("-b", "9"), "-b"),
        (("-o", "xml"), "xml"),
        (("--quant", "int5"), "int5"),
        (("--model-shape", "gpt-9"), "gpt-9"),
        (("--save", "/proc/nowhere/result.json"), "/proc/nowhere/result.json"),
        (("--save", "/"), "--save / cannot"),
    ],
)
def test_a_wrong_flag_of_bench_is_named(cli, flags, named):
    assert named in cli("bench", *flags).error(USAGE)


def test_errors_are_json_where_json_was_asked_for(cli, copied):
    edit_config(copied, model_type="rwkv")
    ended = run(cli, copied, "--json")
    assert ended.code == UNSUPPORTED
    assert set(ended.json) == {"error"}
    error = ended.json["error"]
    assert error["type"] == "UnsupportedModelError"
    assert error["code"] == UNSUPPORTED
    assert "rwkv" in error["message"]
    assert ended.err == ""


def test_the_traceback_is_shown_with_debug_alone(cli, copied):
    edit_config(copied, model_type="rwkv")
    ended = run(cli, copied, "--debug")
    assert ended.code == UNSUPPORTED
    assert "Traceback" in ended.err


def test_a_machine_without_a_compiler_is_told_what_to_install(cli, tmp_path):
    environment = cli.environment(PATH=str(tmp_path), FLASHFORMER_CXX="", CXX="")
    ended = cli.process("run", "x", "--device", "cpu", env=environment)
    assert "g++" in ended.error(RUNTIME)
    assert cli("cache", "list", "--json").json["entries"] == []


def test_a_cache_that_cannot_be_written_costs_a_warning(cli, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    ended = run(cli, checkpoint("llama"))
    assert ended.code == 0
    assert "warning: " in ended.err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_while_caching_costs_a_warning_and_leaves_nothing(cli, checkpoint):
    def forbid_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = ("run", "a stage", "--model", checkpoint("llama"), "-n", 2, *REFERENCE)
    ended = cli.process(*command, preexec_fn=forbid_large_files)
    assert ended.code == 0
    assert "warning: " in ended.err
    assert [path for path in cli.cache.rglob("*") if path.is_file()] == []


def test_a_full_disk_behind_stdout_is_an_error(cli, checkpoint):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "flashformer", "run", "a stage", "-n", "4", *REFERENCE]
        command += ["--model", str(checkpoint("llama"))]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == RUNTIME
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [("run", "-"), ("chat",)])
def test_bytes_that_are_no_text_are_refused(cli, verb):
    program = [sys.executable, "-m", "flashformer", *verb, *REFERENCE]
    done = subprocess.run(program, input=b"\xff", capture_output=True, timeout=60, check=False)
    assert done.returncode == USAGE
    assert b"error: standard input is no UTF-8 text" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_nowhere(cli, checkpoint, closed):
    program = [sys.executable, "-m", "flashformer", "run", "-", "-n", "2", *REFERENCE]
    program += ["--model", str(checkpoint("llama"))]
    line = f"echo a stage | (exec {shlex.join(program)} {closed})"
    done = subprocess.run(line, shell=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_text_is_utf_8_in_any_locale(cli, checkpoint):
    program = [sys.executable, "-m", "flashformer", "run", "-", "-n", "1", "--json", *REFERENCE]
    program += ["--model", str(checkpoint("llama"))]
    found = [
        subprocess.run(
            program,
            input="hé".encode(),
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            timeout=60,
            check=True,
        ).stdout.decode()
        for encoding in ("utf-8", "ascii", "latin-1")
    ]
    ids = [json.loads(text)["token_ids"] for text in found]
    assert ids[0] == ids[1] == ids[2]


def test_a_model_that_does_not_fit_says_which_option_would(cli, copied, monkeypatch):
    memory = cli("inspect", copied, *REFERENCE, "--json").json["memory"]
    need = {entry["format"]: entry["bytes_at_context"] for entry in memory}
    assert need["int8"] < need["bf16"]
    monkeypatch.setattr("flashformer.engine.llm.available_memory", lambda: need["int8"])
    message = run(cli, copied).error(MEMORY)
    assert "context=" in message or "int8" in message
