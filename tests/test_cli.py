"""What the verbs print, where they print it, and with which exit code."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from checkpoints import edit_config, make_checkpoint
from command_line import CommandLine
from flashformer.serve.speed import Speed

REFERENCE = ("--device", "reference")
USAGE = {"prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"}
TIMING = {
    "load_s",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "first_token_s",
    "prompt_tok_s",
    "decode_tok_s",
    "ms_per_token",
    "bytes_per_token",
    "gb_s",
    "read_gb_s",
    "share",
}


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(capsys, monkeypatch, shared_cache):
    return CommandLine(capsys, monkeypatch, shared_cache)


def test_run_without_a_model_says_which_model_answers(cli):
    ended = cli("run", "Once", "-n", 4, *REFERENCE)
    assert ended.code == 0
    assert len(ended.out) > 1
    first, last = ended.err.splitlines()
    assert "embedded default" in first
    assert last.startswith("prompt ")
    assert "· 4 tok" in last
    assert "first token" in last


def test_quiet_leaves_stderr_empty_and_the_text_unchanged(cli):
    loud = cli("run", "Once", "-n", 6, *REFERENCE)
    quiet = cli("run", "Once", "-n", 6, "--quiet", *REFERENCE)
    assert quiet.err == ""
    assert quiet.out == loud.out


def test_run_json_has_exactly_the_promised_fields(cli, checkpoint):
    folder = checkpoint("llama")
    ended = cli("run", "a stage", "--model", folder, "-n", 5, "--json", *REFERENCE)
    assert ended.code == 0
    answer = ended.json
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "timing"}
    assert set(answer["usage"]) == USAGE
    assert set(answer["timing"]) == TIMING
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"]
    assert answer["finish_reason"] in ("length", "stop")
    plain = cli("run", "a stage", "--model", folder, "-n", 5, *REFERENCE)
    assert plain.out == answer["text"] + "\n"


def test_the_speed_of_an_answer_counts_the_bytes_of_the_plan(cli):
    timing = cli("run", "Once", "-n", 9, "--json", *REFERENCE).json["timing"]
    seconds = timing["ms_per_token"] / 1e3
    assert timing["gb_s"] == pytest.approx(timing["bytes_per_token"] / seconds / 1e9)
    # The default model: eleven million bf16 weights.
    assert 21e6 < timing["bytes_per_token"] < 23e6
    assert timing["share"] is None, "a model this small says nothing about memory"


def test_the_line_about_speed_is_the_promised_one():
    speed = Speed(
        load_s=1.0,
        prompt_tokens=34,
        completion_tokens=128,
        cached_tokens=0,
        first_token_s=0.042,
        prompt_tok_s=812.2,
        decode_tok_s=41.3,
        ms_per_token=24.2,
        bytes_per_token=457_000_000,
        gb_s=18.9,
        read_gb_s=24.8,
        share=0.762,
    )
    assert speed.line() == (
        "prompt 34 tok 812 tok/s · 128 tok 41.3 tok/s (24.2 ms/tok, 18.9 GB/s, "
        "76 % of 24.8 GB/s measured now) · first token 42 ms"
    )
    assert set(speed.to_json()) == TIMING


def test_a_prompt_comes_from_standard_input(cli):
    piped = cli("run", "-", "-n", 4, "--json", *REFERENCE, stdin="Once upon\n")
    given = cli("run", "Once upon", "-n", 4, "--json", *REFERENCE)
    assert piped.json["token_ids"] == given.json["token_ids"]
    assert piped.json["usage"] == given.json["usage"]


def test_flags_also_come_from_the_environment(cli, checkpoint, monkeypatch):
    given = cli("run", "x", "--model", checkpoint("llama"), "-n", 3, "--json", *REFERENCE)
    monkeypatch.setenv("FLASHFORMER_MODEL", str(checkpoint("llama")))
    monkeypatch.setenv("FLASHFORMER_MAX_TOKENS", "3")
    monkeypatch.setenv("FLASHFORMER_DEVICE", "reference")
    assert cli("run", "x", "--json").json["token_ids"] == given.json["token_ids"]


def test_the_same_seed_gives_the_same_text(cli):
    sampled = ("run", "x", "-n", 12, "--temp", 1, "--json", *REFERENCE)
    first, again, other = (cli(*sampled, "--seed", s).json["token_ids"] for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_stop_string_ends_the_text_before_it(cli):
    text = cli("run", "x", "-n", 12, "-q", *REFERENCE).out.rstrip("\n")
    stop = text[4:6]
    ended = cli("run", "x", "-n", 12, "--stop", stop, "--json", *REFERENCE)
    assert ended.json["finish_reason"] == "stop"
    assert ended.json["text"] == text[: text.index(stop)]


def test_a_system_message_uses_the_chat_template(cli):
    plain = cli("run", "hi", "-n", 1, "--json", *REFERENCE).json["usage"]
    system = cli("run", "hi", "--system", "be kind", "-n", 1, "--json", *REFERENCE).json["usage"]
    markers = 5  # system, end, user, end, assistant
    assert system["prompt_tokens"] > plain["prompt_tokens"] + markers


def test_chat_keeps_the_conversation_until_it_is_reset(cli):
    lines = "hello\nhello\n/reset\nhello\n/nonsense\n/help\n/exit\nnever\n"
    ended = cli("chat", "-n", 3, "--json", *REFERENCE, stdin=lines)
    assert ended.code == 0
    answers = [json.loads(part) for part in ended.out.replace("}\n{", "}\0{").split("\0")]
    prompts = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert len(prompts) == 3
    assert prompts[1] > prompts[0] == prompts[2]
    assert "/nonsense is no command" in ended.err
    assert "/reset" in ended.err


class Person:
    """Somebody at a terminal."""

    def __init__(self, *argv):
        pid, self._terminal = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "flashformer", *argv])
        self._pid, self.seen = pid, b""

    def type(self, text):
        os.write(self._terminal, text)

    def wait_for(self, text):
        """What appeared up to and with `text`, since the last call."""
        while text not in self.seen:
            self.read()
        found, self.seen = self.seen.split(text, 1)
        return found + text

    def read(self):
        ready, _, _ = select.select([self._terminal], [], [], 60)
        assert ready, self.seen
        self.seen += os.read(self._terminal, 4096)

    def exit_code(self):
        with contextlib.suppress(OSError):  # the terminal closes with the program
            while os.read(self._terminal, 4096):
                pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def test_ctrl_c_stops_an_answer_and_not_the_chat(cli):
    person = Person("chat", "--context", "300", *REFERENCE)
    person.wait_for(b"> ")
    person.type(b"hello\n")
    person.wait_for(b"hello\r\n")
    person.read()  # the first of the answer
    person.type(b"\x03")
    person.wait_for(b"> ")
    person.type(b"/help\n")
    assert b"/reset" in person.wait_for(b"Ctrl-C stops an answer.")
    person.wait_for(b"> ")
    person.type(b"7" * 300 + b"\n")  # a digit is a token
    assert b"context" in person.wait_for(b"forgets the conversation")
    person.wait_for(b"> ")
    person.type(b"\x04")
    assert person.exit_code() == 0


def test_inspect_tells_architecture_parameters_and_memory(cli, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3")
    report = cli("inspect", folder, "--json").json
    assert report["supported"] is True
    assert (report["model_type"], report["num_layers"], report["dtype"]) == ("qwen3", 2, "bf16")
    tensors = load_file(folder / "model.safetensors").values()
    count = sum(tensor.size for tensor in tensors)
    assert report["parameters"] == count
    formats = {memory["format"]: memory for memory in report["memory"]}
    assert formats["int4"]["weight_bytes"] < formats["int8"]["weight_bytes"]
    assert formats["int8"]["weight_bytes"] < formats["bf16"]["weight_bytes"]
    assert "qwen3, 2 layers" in cli("inspect", folder).out
    spec = cli("inspect", folder, "--spec", "--json").json
    assert len(spec["layers"]) == 2
    assert "layers[1]: num_q_heads=6" in cli("inspect", folder, "--spec").out


def test_inspect_says_what_is_unsupported_and_why(cli, copied):
    edit_config(copied, model_type="mamba")
    ended = cli("inspect", copied, "--json")
    assert ended.code == 3
    assert ended.json["supported"] is False
    assert "mamba" in ended.json["reason"]
    assert "not supported" in cli("inspect", copied).out


def test_plan_shows_every_stage_and_the_header(cli, checkpoint):
    folder = checkpoint("llama")
    text = cli("plan", folder, "--quant", "int4", "--threads", 3).out
    for stage in ("qkv", "attention", "o_proj", "gate_up", "down", "lm_head"):
        assert stage in text
    assert "3 CTAs" in text
    plan = cli("plan", folder, "--quant", "int4", "--threads", 3, "--json").json
    assert plan["options"]["format"] == "int4"
    assert plan["machine"]["num_ctas"] == 3
    header = cli("plan", folder, "--threads", 3, "--source").out
    assert "namespace config" in header
    assert "num_ctas = 3;" in header


def test_after_compile_a_run_finds_everything_cached_and_equals_the_reference(cli, checkpoint):
    folder = checkpoint("qwen3")
    made = cli("compile", folder, "--device", "cpu", "--threads", 2, "--json").json
    assert made["image_bytes"] > 0
    before = {entry["name"] for entry in cli("cache", "list", "--json").json["entries"]}
    run = ("run", "a stage ends", "--model", folder, "-n", 12, "--json")
    on_cpu = cli(*run, "--device", "cpu", "--threads", 2).json
    assert {entry["name"] for entry in cli("cache", "list", "--json").json["entries"]} == before
    assert on_cpu["token_ids"] == cli(*run, *REFERENCE).json["token_ids"]


def test_the_cache_is_listed_and_cleared_by_kind(capsys, monkeypatch, tmp_path):
    cli = CommandLine(capsys, monkeypatch, tmp_path / "cache")
    cli("run", "x", "-n", 1, "-q", *REFERENCE)
    assert "1 entries" in cli("cache", "list", "--kind", "images").out
    assert cli("cache", "clear", "--kind", "kernels", "--json").json["removed"] == 0
    assert cli("cache", "clear", "--json").json["removed"] == 1
    assert cli("cache", "list", "--json").json["entries"] == []


def test_doctor_is_content_where_the_cpu_path_runs(cli):
    ended = cli("doctor")
    assert ended.code == 0
    assert {line.split()[0] for line in ended.out.splitlines()} <= {"ok", "warn"}
    subjects = {finding["subject"] for finding in cli("doctor", "--json").json["findings"]}
    assert {"python", "compiler", "processor", "threads", "memory", "cache", "gpu"} <= subjects


def test_doctor_fails_with_a_cure_where_there_is_no_compiler(cli, monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CXX", "no-such-compiler")
    ended = cli("doctor", "--json")
    assert ended.code == 1
    assert ended.json["ready"] is False
    (failed,) = [f for f in ended.json["findings"] if f["level"] == "fail"]
    assert failed["subject"] == "compiler"
    assert "no-such-compiler" in failed["detail"]


def test_every_verb_has_help_and_the_version_is_the_package_s(cli):
    import flashformer

    assert cli("--version").out == f"flashformer {flashformer.__version__}\n"
    for verb in ("run", "chat", "inspect", "plan", "compile", "bench", "doctor", "cache"):
        ended = cli(verb, "--help")
        assert ended.code == 0
        assert "Usage" in ended.out


def test_ctrl_c_ends_a_run_with_130_and_the_text_so_far(cli):
    long = "import"  # has no end but that of the context
    command = [sys.executable, "-m", "flashformer", "run", long, *REFERENCE]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ.copy()
    )
    assert process.stdout is not None
    begun = process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - started < 10
    assert len(begun) == 4
    assert b"Traceback" not in out + err


def test_a_reader_that_leaves_is_no_error(cli):
    command = [sys.executable, "-m", "flashformer", "run", "x", "-n", "300", *REFERENCE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=30) == 0
    assert b"Traceback" not in said
    assert b"Broken" not in said
