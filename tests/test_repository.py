"""What is promised about the repository as a whole: sizes, names, documents, import cost."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "flashformer"
MAX_LINES = 400
MAX_IMPORT_SECONDS = 0.150
CODE_SUFFIXES = {".py", ".h", ".hpp", ".cpp", ".cu", ".cuh"}
ADR_HEADINGS = ["Status", "Context", "Decision", "Consequences"]

# Built from pieces, so that this file does not contain what it forbids.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:work|root|home|Users|mnt|scratch)/\w",
    "objects that run code": r"\bpick" + r"le\b",
    "evaluated text": r"(?<![\w.])ev" + r"al\(",
    "checkpoints that run code": r"torch\.lo" + r"ad\b",
    "a template outside the sandbox": r"jinja2\.Env" + r"ironment\(",
    "a note to do something later": r"\bTO" + r"DO\b|\bFIX" + r"ME\b",
}


def code_files() -> list[Path]:
    folders = (ROOT / "src", ROOT / "tests", ROOT / "benchmarks", ROOT / "tools")
    return [p for f in folders for p in sorted(f.rglob("*")) if p.suffix in CODE_SUFFIXES]


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_no_file_is_longer_than_the_limit():
    too_long = {
        str(path.relative_to(ROOT)): count
        for path in code_files()
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not too_long


def test_the_limit_looks_at_every_package():
    seen = {path.relative_to(PACKAGE).parts[0] for path in code_files() if PACKAGE in path.parents}
    assert {"model", "quant", "plan", "codegen", "backends", "engine", "serve"} <= seen


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains_what_is_forbidden(what):
    pattern = re.compile(FORBIDDEN[what])
    files = [*code_files(), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    if what in ("a path of one machine", "a note to do something later"):
        files += documents()
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def route_rows() -> list[list[str]]:
    text = (ROOT / "docs" / "route.md").read_text()
    table = text.split("| step |", 1)[1].split("\n\n", 1)[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| ") and not line.startswith("|---")
    ]


def names_in(path: Path) -> set[str]:
    """Every function, class and method (as Class.method) that a Python file defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return names


def test_every_name_in_the_route_table_exists():
    rows = route_rows()
    assert len(rows) >= 8
    missing = []
    for row in rows:
        entries = re.findall(r"`([\w/.]+) : ([\w.]+)`", row[2])
        assert entries, f"no `file : name` in {row}"
        for file, name in entries:
            path = PACKAGE / file
            if not path.exists() or name not in names_in(path):
                missing.append(f"{file} : {name}")
    assert not missing


def test_every_command_in_the_route_table_is_a_verb():
    from flashformer.serve.cli import VERBS

    for row in route_rows():
        commands = re.findall(r"`flashformer (\w+)", row[3])
        assert commands, f"no command in {row}"
        assert set(commands) <= VERBS.keys()


def test_the_readme_shows_the_same_route_as_the_documents():
    readme = (ROOT / "README.md").read_text()
    for row in route_rows():
        assert row[2] in readme


def test_the_readme_and_ci_run_the_same_test_command():
    readme = (ROOT / "README.md").read_text()
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert "pytest" in last
    assert f"\n{last}\n" in readme


def test_the_readme_s_tables_are_those_of_the_result_files():
    check = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/tables.py"


def test_the_tables_of_the_verification_are_those_of_the_result_files():
    check = [sys.executable, str(ROOT / "benchmarks" / "verification.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/verification.py"


def test_the_server_s_bars_are_those_of_the_result_files():
    check = [sys.executable, str(ROOT / "benchmarks" / "server_bars.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/server_bars.py"


def test_the_waterfall_s_tables_are_those_of_the_result_files():
    check = [sys.executable, str(ROOT / "benchmarks" / "waterfall.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/waterfall.py"


def test_links_between_documents_lead_somewhere():
    broken = []
    for document in documents():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_decision_record_has_its_headings_and_its_number():
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert len(records) >= 7
    for number, record in enumerate(records, 1):
        text = record.read_text()
        assert record.name.startswith(f"{number:04d}-")
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ADR_HEADINGS
        assert len(text.splitlines()) <= 60, "a record is one page"


def test_the_changelog_has_a_place_for_what_comes_next():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)


def test_importing_the_package_is_quick():
    code = (
        "import time; start = time.perf_counter(); import flashformer;"
        "print(time.perf_counter() - start)"
    )
    # The minimum: a busy machine only ever makes an import slower.
    runs = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert min(runs) <= MAX_IMPORT_SECONDS


def test_the_core_imports_neither_torch_nor_transformers():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if "cuda" not in path.parts and path.name != "__init__.py"
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_public_name_can_be_imported():
    flashformer = importlib.import_module("flashformer")
    assert flashformer.__all__
    for name in flashformer.__all__:
        assert getattr(flashformer, name) is not None
