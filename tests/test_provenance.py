"""A result says which sources it was measured with, also where there is no git to ask."""

import json
import subprocess

import pytest

from flashformer.errors import UsageError
from flashformer.serve.benchmark.provenance import git_state, provenance, tree_id

COMMIT = "0123456789abcdef"


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def sources(tmp_path):
    """A package with names that git sorts in its own way, and what git does not keep."""
    for name in ("a.py", "a-b/inner.py", "a/deep/er.py", "ab.py", "empty.py"):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.py" else f"# {name}\n")
    (tmp_path / "package" / "__pycache__").mkdir()
    (tmp_path / "package" / "__pycache__" / "a.pyc").write_bytes(b"x")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path / "package"


def test_the_tree_is_the_one_that_git_names(sources):
    assert tree_id(sources) == git(sources.parent, "rev-parse", "HEAD:package")


def test_a_changed_file_is_another_tree(sources):
    before = tree_id(sources)
    (sources / "a" / "deep" / "er.py").write_text("changed")
    assert tree_id(sources) != before


def test_a_working_tree_says_its_commit_and_whether_it_was_changed(sources):
    head = git(sources, "rev-parse", "HEAD")
    assert git_state(sources) == {"commit": head, "dirty": False}
    (sources / "new.py").write_text("")
    assert git_state(sources) == {"commit": head, "dirty": True}


def test_a_copy_outside_of_git_has_no_commit_but_the_given_one(tmp_path):
    assert git_state(tmp_path) is None
    assert git_state(tmp_path, COMMIT) == {"commit": COMMIT, "given": True}


def test_a_folder_that_some_other_repository_does_not_keep_has_no_commit(sources):
    copy = sources.parent / "copied"
    copy.mkdir()
    (copy / "a.py").write_text("")
    assert git_state(copy) is None


def test_the_environment_gives_a_commit_and_an_argument_comes_before_it(monkeypatch):
    monkeypatch.setenv("FLASHFORMER_COMMIT", COMMIT)
    assert provenance()["git"] == {"commit": COMMIT, "given": True}
    assert provenance("f" * 40)["git"] == {"commit": "f" * 40, "given": True}


@pytest.mark.parametrize("text", ["main", "", "abc", "g" * 40, "0123456789abcdef\n"])
def test_what_is_no_commit_is_refused(text):
    with pytest.raises(UsageError, match="7 to 40 hexadecimal digits"):
        provenance(text or " ")


def test_the_command_line_takes_a_commit(cli):
    flags = ("bench", "--device", "cpu", "-p", 0, "-n", 2, "-r", 1, "--commit", COMMIT, "--json")
    ended = cli(*flags)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["git"] == {"commit": COMMIT, "given": True}
    assert "hexadecimal" in cli("bench", "--commit", "main").error(2)
