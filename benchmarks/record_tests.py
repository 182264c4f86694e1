"""A pytest plugin that keeps what it knows: a JSON line as each test starts and as it ends.

RECORD_TESTS=FILE pytest -p record_tests: a run that is killed has lost its last test alone
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "RECORD_TESTS"
UNFINISHED = "unfinished"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """A test begins; if nothing else follows, it did not end."""
    _write(item.nodeid, UNFINISHED, 0.0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of a test has ended: its call, or a setup or teardown that did not go well."""
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report.duration)


def _write(node: str, outcome: str, seconds: float) -> None:
    file, _, name = node.partition("::")
    test = {"name": name, "file": Path(file).stem, "outcome": outcome, "seconds": round(seconds, 2)}
    with Path(os.environ[VARIABLE]).open("a") as lines:
        lines.write(json.dumps(test) + "\n")


def read_tests(path: Path) -> list[dict[str, Any]]:
    """Every test with the last that was written about it, in the order of their starts."""
    tests: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        test = json.loads(line)
        key = (test["file"], test["name"])
        # A failed teardown comes behind a call that went well, and counts.
        tests[key] = {**tests.get(key, {}), **test}
    return list(tests.values())
