"""The first run answers at once with the reference backend; the kernel is compiled behind it."""

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from flashformer.serve import first_run
from flashformer.serve import run as run_verb
from flashformer.serve.load import LoadOptions
from flashformer.serve.terminal import Terminal

EMBEDDED = LoadOptions(None, "auto", None, None, 1)


@pytest.fixture
def started(monkeypatch):
    """The compilations that were started in the background, none of which runs."""
    found = []
    monkeypatch.setattr(run_verb, "compile_in_background", found.append)
    return found


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr("flashformer.backends._has_gpu", lambda: False)


@pytest.fixture(autouse=True)
def _threads_as_before():
    with threadpool_limits(2, user_api="blas"):
        yield


def test_the_first_run_answers_before_the_kernel_is_compiled(cli, started):
    first = cli("run", "def f(", "-n", 4)
    assert first.code == 0
    assert "reference backend" in first.err
    assert [options.device for options in started] == ["auto"]
    assert first.out == cli("run", "def f(", "-n", 4, "--device", "reference").out
    assert cli("compile", "--device", "cpu").code == 0
    second = cli("run", "def f(", "-n", 4)
    assert "reference backend" not in second.err
    assert len(started) == 1


def test_the_first_answer_keeps_to_one_thread_which_a_busy_core_does_not_hold_up(cli, started):
    cli("run", "def f(", "-n", 1)
    libraries = [entry for entry in threadpool_info() if entry["user_api"] == "blas"]
    assert {entry["num_threads"] for entry in libraries} == {1}


def test_without_a_compiler_the_embedded_model_still_answers(cli, started, monkeypatch):
    monkeypatch.setenv("FLASHFORMER_CXX", "no-such-compiler")
    ended = cli("run", "def f(", "-n", 4)
    assert ended.code == 0
    assert "no-such-compiler" in ended.err
    assert not started


@pytest.mark.parametrize(
    "options",
    [
        LoadOptions("some/model", "auto", None, None, 1),
        LoadOptions(None, "cpu", None, None, 1),
        LoadOptions(None, "reference", None, None, 1),
    ],
)
def test_whoever_names_a_model_or_a_device_gets_it(options):
    assert first_run.quick_start(options, Terminal(quiet=True)) == first_run.Start(options)


def test_what_is_compiled_behind_the_answer_is_what_the_next_run_needs(cli, monkeypatch):
    commands = []
    options = LoadOptions(None, "auto", "int8", 64, 1)
    with monkeypatch.context() as patch:
        patch.setattr(first_run.subprocess, "Popen", lambda command, **_: commands.append(command))
        first_run.compile_in_background(options)
    (command,) = commands
    assert cli(*command[command.index("compile") :]).code == 0
    assert first_run.quick_start(options, Terminal(quiet=True)) == first_run.Start(options)
