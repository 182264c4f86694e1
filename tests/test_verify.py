"""The verification of the kernel loses nothing that it has found, and says what it has not."""

import json
import time

import pytest

import verify
from record_tests import read_tests

FILE = """
import time
import pytest

pytestmark = pytest.mark.gpu


def test_good(): pass


@pytest.mark.parametrize("number", [1, 2])
def test_of(number): assert number == 1


@pytest.fixture
def broken():
    yield
    raise RuntimeError


def test_teardown(broken): pass


def test_slow(): time.sleep(60)


def test_never(): pass
"""
PART = {
    "schema": 1,
    "kind": "verification",
    "tree": "a" * 40,
    "date": "2026-01-01",
    "command": ["python"],
    "git": None,
    "system": {"cpu": "EPYC"},
    "machine": {"gpu": "H200"},
    "tools": [],
    "left_out": [],
}


def entry(name, outcome="passed", file="test_x"):
    return {"name": name, "file": file, "outcome": outcome, "seconds": 1.0}


def test_a_run_that_is_cut_short_keeps_what_has_ended_and_names_what_has_not(
    tmp_path,
):
    (tmp_path / "test_some.py").write_text(FILE)
    found = []
    verify.run_tests(str(tmp_path / "test_some.py"), "", time.monotonic() + 10, found)
    assert {t["name"]: t["outcome"] for t in found} == {
        "test_good": "passed",
        "test_of[1]": "passed",
        "test_of[2]": "failed",
        "test_teardown": "failed",
        "test_slow": "unfinished",
    }
    assert {t["file"] for t in found} == {"test_some"}


def test_a_file_that_cannot_be_read_or_was_not_started_is_not_content(tmp_path):
    (tmp_path / "test_bad.py").write_text("import nothing_of_that_name")
    found = []
    verify.run_tests(str(tmp_path / "test_bad.py"), "", time.monotonic() + 60, found)
    verify.run_tests("tests/test_late.py", "", time.monotonic() - 1, found)
    assert [(t["file"], t["outcome"]) for t in found] == [
        ("test_bad", "failed"),
        ("test_late", "unfinished"),
    ]
    assert (
        verify.finish({"tests": found, "tools": [], "left_out": []}, tmp_path / "found.json") == 1
    )


def test_parts_are_merged_and_the_later_one_counts(tmp_path):
    first = {
        **PART,
        "tests": [
            entry("a"),
            entry("b", "unfinished"),
            entry(verify.WHOLE_FILE, "failed", "test_y"),
        ],
    }
    second = {**PART, "tests": [entry("b"), entry("c", file="test_y")], "date": "2026-01-02"}
    found = verify.merged([first, second])
    assert [(t["name"], t["outcome"]) for t in found["tests"]] == [
        ("a", "passed"),
        ("b", "passed"),
        ("c", "passed"),
    ]
    assert [run["date"] for run in found["runs"]] == ["2026-01-01", "2026-01-02"]
    assert verify.finish(found, tmp_path / "new" / "found.json") == 0
    assert json.loads((tmp_path / "new" / "found.json").read_text()) == found


@pytest.mark.parametrize("change", [{"tree": "b" * 40}, {"machine": {"gpu": "H100"}}])
def test_parts_of_other_sources_or_gpus_are_not_merged(change):
    with pytest.raises(SystemExit, match="differ"):
        verify.merged([{**PART, "tests": []}, {**PART, "tests": [], **change}])


def test_a_sanitizer_that_is_missing_or_too_slow_is_not_clean():
    ended = verify.run(["no-such-sanitizer"], time.monotonic() + 10)
    assert "is not installed" in ended.stderr
    assert verify.run(["sleep", "60"], time.monotonic() + 0.2).returncode == 124


def test_a_sanitizer_that_was_not_started_is_missed_until_another_part_has_it(tmp_path):
    tool = {"tool": "memcheck", "clean": True}
    cut, rest = {**PART, "tests": [], "left_out": ["memcheck"]}, {**PART, "tests": []}
    assert verify.finish(verify.merged([cut, rest]), tmp_path / "a.json") == 1
    assert verify.finish(verify.merged([cut, {**rest, "tools": [tool]}]), tmp_path / "b.json") == 0


def test_a_file_that_was_never_written_holds_no_tests(tmp_path):
    assert read_tests(tmp_path / "none") == []
