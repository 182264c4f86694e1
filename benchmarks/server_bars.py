"""Writes the table of docs/server.md from the result files of benchmarks/server.

python benchmarks/server_bars.py [--check]
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from generated import between_marks, load_results, rewrite

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "server"
DOCUMENT = ROOT / "docs" / "server.md"

Result = dict[str, Any]


def main() -> None:
    """Rewrite the page, or with --check only say whether it is up to date."""
    rewrite({DOCUMENT: with_table(DOCUMENT.read_text(), load_results(RESULTS))}, __doc__)


def with_table(page: str, results: list[Result]) -> str:
    """The page with a row for each kind of result; several files of a kind count together."""
    lines = ["| bar | measured | results |", "|---|---|---|"]
    for name, row in ROWS.items():
        runs = [result for result in results if result["kind"] == f"server-{name}"]
        if runs:
            bar, measured = row(runs)
            missed = "" if all(run["passed"] for run in runs) else "**missed:** "
            links = ", ".join(map(link, runs))
            lines.append(f"| {bar} | {missed}{measured} | {links} |")
    return between_marks(page, "\n".join([*lines, "", source(results)]) + "\n")


def link(run: Result) -> str:
    """The file in the repository."""
    return f"[{run['file']}](../benchmarks/results/server/{run['file']})"


def source(results: list[Result]) -> str:
    """Where the numbers come from; those of files that no commit holds are not shown."""
    changed = [run["file"] for run in results if run["provenance"]["git"]["dirty"]]
    if changed:
        raise SystemExit(f"measured with files that no commit holds: {', '.join(changed)}")
    systems = sorted({f"{run['system']['cpu']}, {run['system']['cores']} cores" for run in results})
    commits = sorted({run["provenance"]["git"]["commit"][:12] for run in results})
    return f"{'; '.join(systems)}; commit {', '.join(commits)}."


def first_run(runs: list[Result]) -> tuple[str, str]:
    """A newcomer's first line."""
    run = runs[-1]
    first, second = run["first_run_seconds"], run["second_run_seconds"]
    return (
        f'`flashformer run "{run["prompt"]}"` with an empty cache, {len(first)} times',
        f"{median(first):.2f} s ({min(first):.2f} to {max(first):.2f}); with the kernel, which is "
        f"compiled meanwhile, {median(second):.2f} s",
    )


def clients(runs: list[Result]) -> tuple[str, str]:
    """Concurrent streams that are left."""
    run = runs[-1]
    idle = max(turn["idle_after_seconds"] for turn in run["rounds"])
    growth, first = run["rss_growth"], run["rss_growth_of_the_first_round"]
    return (
        f"{run['clients']} concurrent streams, random departures (close, reset, half-close, never "
        f"read), {len(run['rounds']) - 1} rounds after a first",
        f"nothing held after {1e3 * idle:.0f} ms; descriptors, threads and tasks as before; memory "
        f"{growth['http']:+.1%} (HTTP) and {growth['engine']:+.1%} (engine), in the first round "
        f"{first['http']:+.1%} and {first['engine']:+.1%}",
    )


def fuzz(runs: list[Result]) -> tuple[str, str]:
    """Wrong requests."""
    run = runs[-1]
    growth = run["rss_growth"]
    return (
        f"{run['requests']:,} structured wrong requests on six routes",
        f"no 5xx; the last answer is the first, to the bit; {run['per_second']:.0f} requests a "
        f"second; memory {growth['http']:+.1%} (HTTP) and {growth['engine']:+.1%} (engine)",
    )


def neighbours(runs: list[Result]) -> tuple[str, str]:
    """A victim and those beside it."""
    run = runs[-1]
    return (
        f"hostile neighbours, {run['trials']} trials",
        f"the victim's tokens and logprobs differ in {len(run['differing'])}; "
        f"{run['neighbours_served']} neighbours served, {run['neighbours_refused']} refused",
    )


def cancel(runs: list[Result]) -> tuple[str, str]:
    """Clients that leave at a stage."""
    stages = runs[-1]["stages"].values()
    idle = max(stage["idle_after_seconds"] for stage in stages)
    times = min(stage["times"] for stage in stages)
    return (
        f"clients that leave at {len(stages)} stages, {times} times each, as fast as one can",
        f"all is free {1e3 * idle:.0f} ms after the last; descriptors and threads as before",
    )


def kills(runs: list[Result]) -> tuple[str, str]:
    """Moments at which a process dies."""
    moments = sum(sum(run["kills"].values()) for run in runs)
    orphans = max(run["longest_orphan_seconds"] for run in runs)
    failures = sum(len(run["failures"]) for run in runs)
    phases = ", ".join(runs[-1]["kills"])
    return (
        f"`kill -9` at {moments} random moments ({phases})",
        f"{moments - failures} of {moments} next starts clean, with the same answer; children "
        f"outlive their parent by at most {orphans:.2f} s",
    )


def overhead(runs: list[Result]) -> tuple[str, str]:
    """What a token costs more than through the Python API."""
    run = runs[-1]
    step = run["streams"] * median(run["api_us_per_token"]) / 1e3
    return (
        f"a token's cost over the Python API, {run['streams']} streams",
        f"{run['overhead_us_per_token']:.0f} µs, the difference of medians of "
        f"{len(run['api_us_per_token'])}; a step takes {step:.1f} ms",
    )


ROWS: dict[str, Callable[[list[Result]], tuple[str, str]]] = {
    "first_run": first_run,
    "clients": clients,
    "fuzz": fuzz,
    "neighbours": neighbours,
    "cancel": cancel,
    "kills": kills,
    "overhead": overhead,
}

if __name__ == "__main__":
    main()
