"""Writes the tables of docs/waterfall.md from the timelines in benchmarks/results/profile.

python benchmarks/waterfall.py [--check]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import between_marks, load_results, rewrite

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "profile"
DOCUMENT = ROOT / "docs" / "waterfall.md"


def main() -> None:
    """Rewrite the page, or with --check only say whether it is up to date."""
    rewrite({DOCUMENT: with_tables(DOCUMENT.read_text(), newest_of_each())}, __doc__)


def newest_of_each() -> list[dict[str, Any]]:
    """The newest timeline of everything that was recorded."""
    found = sorted(load_results(RESULTS), key=lambda result: str(result["date"]))
    newest = {result["what"]: result for result in found}
    return [newest[what] for what in sorted(newest)]


def with_tables(page: str, results: list[dict[str, Any]]) -> str:
    """The page with the text between the two marks replaced."""
    text = "\n".join(line for result in results for line in section(result))
    return between_marks(page, f"{text or 'No timeline is checked in yet.'}\n")


def section(result: dict[str, Any]) -> Iterator[str]:
    """One model: what the memory does, then what the stages do."""
    total = sum(part["us"] for part in result["waterfall"])
    commit = ((result.get("git") or {}).get("commit") or "unknown")[:12]
    where = f"{result['gpu']['name']}, {result['date'][:10]}, commit {commit}"
    yield f"### {result['what']}"
    yield ""
    yield f"{where} ([file](../benchmarks/results/profile/{result['file']})): {total:.1f} µs a "
    yield f"token with the timeline compiled in, read bandwidth {result['read_gb_s']:.0f} GB/s."
    yield ""
    yield from ("| memory | | µs | of the token |", "|---|---|---:|---:|")
    for part in result["waterfall"]:
        state = "idle" if part["idle"] else "busy"
        yield f"| {state} | {part['name']} | {part['us']:.1f} | {part['us'] / total:.1%} |"
    yield f"| | **token** | **{total:.1f}** | |"
    yield ""
    yield from (
        "| stage | calls | work µs | longest CTA | wait µs | longest CTA | ring empty µs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    )
    for row in result["stages"]:
        numbers = ("work_us", "work_max_us", "wait_us", "wait_max_us", "ring_us")
        cells = " | ".join(f"{row[name]:.1f}" for name in numbers)
        yield f"| {row['stage']} | {row['calls']} | {cells} |"
    yield ""


if __name__ == "__main__":
    main()
