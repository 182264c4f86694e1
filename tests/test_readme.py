"""The README's examples run as they stand, with a tiny checkpoint in the place of the reader's."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PLACEHOLDER = "path/to/checkpoint"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines():
    """Every `flashformer ...` line, that of the set-up included."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line.split("bin/")[-1]) for line in lines if "flashformer " in line]


def test_the_python_example_runs(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHFORMER_THREADS", "2")
    (source,) = blocks("python")
    source = source.replace(f'"{PLACEHOLDER}"', f"{str(checkpoint('llama'))!r}")
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    logits = names["logits"]
    assert logits.shape == (3, names["llm"].spec.vocab_size)
    assert str(logits.dtype) == "float32"
    names["llm"].close()
    assert capsys.readouterr().out


def test_there_are_two_set_up_lines_and_one_of_them_runs_the_default_model():
    lines = [line for block in blocks("sh") for line in block.splitlines() if "venv" in line]
    assert len(lines) == 2
    assert sum("flashformer run" in line for line in lines) == 1
    assert sum("pytest" in line for line in lines) == 1


def test_every_example_of_the_command_line_runs(cli, checkpoint, monkeypatch):
    # The reference backend stands in: what is tested is the command line, not the kernel.
    monkeypatch.setenv("FLASHFORMER_DEVICE", "reference")
    verbs = set()
    for program, verb, *rest in command_lines():
        assert program == "flashformer"
        verbs.add(verb)
        if verb in ("bench", "serve"):
            flags = {part for part in rest if part.startswith("-")}
            assert all(flag in cli(verb, "--help").out for flag in flags)
            continue
        argv = [part.replace(PLACEHOLDER, str(checkpoint("llama"))) for part in rest]
        ended = cli(verb, *argv, stdin="hello\n/exit\n")
        assert ended.code == 0, ended.err
        assert ended.out
    assert verbs == {"run", "chat", "serve", "inspect", "plan", "bench", "eval", "doctor"}
