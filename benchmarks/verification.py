"""Writes the tables of docs/verification.md from the result files.

python benchmarks/verification.py [--check]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import between_marks, load_results, rewrite

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "verification"
DOCUMENT = ROOT / "docs" / "verification.md"


def main() -> None:
    """Rewrite the page, or with --check only say whether it is up to date."""
    found = sorted(load_results(RESULTS), key=lambda result: str(result["date"]), reverse=True)
    rewrite({DOCUMENT: with_tables(DOCUMENT.read_text(), found)}, __doc__)


def with_tables(page: str, results: list[dict[str, Any]]) -> str:
    """The page with the tables of the newest of some results, which come newest first."""
    lines = "\n".join([*tests(results), *tools(results), *compiled(results)])
    return between_marks(page, f"{lines or 'No results yet.'}\n")


def newest(results: list[dict[str, Any]], section: str) -> dict[str, Any] | None:
    """The newest result that has something in a section."""
    return next((result for result in results if result.get(section)), None)


def source(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    commit = (result.get("git") or {}).get("commit")
    where = result.get("machine", {}).get("gpu", "no GPU")
    return f"{where}, {result['date'][:10]}, commit {commit[:12] if commit else 'unknown'}"


def link(result: dict[str, Any]) -> str:
    """The file in the repository."""
    return f"[{result['file']}](../benchmarks/results/verification/{result['file']})"


def tests(results: list[dict[str, Any]]) -> Iterator[str]:
    """Every test file's newest run."""
    told: set[str] = set()
    for result in results:
        run = [test for test in result.get("tests", []) if test["file"] not in told]
        if not run:
            continue
        told |= {test["file"] for test in run}
        passed = sum(test["outcome"] == "passed" for test in run)
        yield f"**Tests on the GPU** ({source(result)}; {link(result)}): {passed} of "
        yield f"{len(run)} passed."
        yield ""
        yield from ("| test | outcome | seconds |", "|---|---|---:|")
        for test in run:
            name = test["name"].removeprefix("test_").replace("_", " ").replace("|", " ")
            yield f"| {name} | {test['outcome']} | {test['seconds']:.1f} |"
        yield ""


def tools(results: list[dict[str, Any]]) -> Iterator[str]:
    """What the sanitizers said."""
    result = newest(results, "tools")
    if result is None:
        return
    yield f"**compute-sanitizer** ({source(result)}; {link(result)})"
    yield ""
    yield from ("| tool | clean | same bits | summary | seconds |", "|---|---|---|---|---:|")
    for tool in result["tools"]:
        clean, equal = ("yes" if tool[key] else "no" for key in ("clean", "equal_bits"))
        summary = " ".join(tool["summary"].split()).replace("|", " ")
        yield f"| {tool['tool']} | {clean} | {equal} | {summary} | {tool['seconds']:.0f} |"
    yield ""


def compiled(results: list[dict[str, Any]]) -> Iterator[str]:
    """Registers and spills by architecture."""
    result = newest(results, "compiled")
    if result is None:
        return
    yield f"**Compiled** ({source(result)}; {link(result)})"
    yield ""
    yield from (
        "| architecture | model | registers | spilled bytes | seconds |",
        "|---|---|---:|---:|---:|",
    )
    for row in result["compiled"]:
        numbers = f"{row['registers']} | {row['spill_bytes']} | {row['seconds']:.1f}"
        yield f"| {row['arch']} | {row['model']} | {numbers} |"
    yield ""


if __name__ == "__main__":
    main()
