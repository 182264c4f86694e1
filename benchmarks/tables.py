"""Writes the README's tables of speed from the result files.

python benchmarks/tables.py [--check]
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COMPARISON = (
    "| model | format | test | FlashFormer tok/s | share of bandwidth | {peer} tok/s | ratio |",
    "|---|---|---|---:|---:|---:|---:|",
)
NEIGHBOUR = (
    "| model | format | beside an endless loop on one core | alone tok/s | beside tok/s | kept |",
    "|---|---|---|---:|---:|---:|",
)
ALONE = (
    "| model | format | test | tok/s | ms/step | GB/s | share of bandwidth |",
    "|---|---|---|---:|---:|---:|---:|",
)
PROMPTS = (
    "| model | format | prompt | first token, ms | prompt tok/s |",
    "|---|---|---:|---:|---:|",
)


def main() -> None:
    """Rewrite the README, or with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = with_tables(old, load_results(RESULTS))
    if arguments.check:
        raise SystemExit(int(new != old))
    path.write_text(new)


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every result file with its name, oldest first."""
    return [
        {**json.loads(path.read_text()), "file": path.name}
        for path in sorted(folder.glob("*.json"))
    ]


def with_tables(readme: str, results: list[dict[str, Any]]) -> str:
    """The README with the text between the two marks replaced."""
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{tables(results)}{END}{after}"


def tables(results: list[dict[str, Any]]) -> str:
    """One table for each machine and kind of result; of equal cases the newest counts."""
    newest: dict[tuple[str, str], dict[tuple[str, ...], tuple[str, str]]] = {}
    heads: dict[tuple[str, str], tuple[str, ...]] = {}
    for result in results:
        place = (title(result), result["kind"])
        head, rows_of = KINDS.get(result["kind"], (ALONE, bench_rows))
        peer = result["peer"]["name"] if "peer" in result else ""
        heads[place] = tuple(line.format(peer=peer) for line in head)
        rows = newest.setdefault(place, {})
        for case, line in rows_of(result):
            rows[case] = (line, result["file"])
    parts = []
    for place, rows in newest.items():
        files = sorted({file for _, file in rows.values()})
        links = ", ".join(
            f"[{number}](benchmarks/results/{f})" for number, f in enumerate(files, 1)
        )
        lines = [f"\n{place[0]} (files {links}):\n", *heads[place]]
        parts.append("\n".join([*lines, *(line for line, _ in rows.values())]) + "\n")
    return "".join(parts) + "\n" if parts else "\nNo result file is checked in yet.\n\n"


def title(result: dict[str, Any]) -> str:
    """The machine in a few words."""
    if "gpu" in result:
        return f"**{result['gpu']['name']}**"
    compares = result["kind"] in KINDS
    cpu = result["system" if compares else "machine"]["cpu"]
    threads = result["threads"] if compares else result["machine"]["threads"]
    return f"**{cpu}, {threads} threads**"


def comparison_rows(result: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Case and line of every row of a comparison."""
    peer = result["peer"]["name"]
    rows = []
    for pair in result["pairs"]:
        for test, speeds in pair["tok_s"].items():
            case = (result["model"]["name"], pair["format"], test)
            cells = (
                *case[:1],
                f"{pair['format']} / {pair['peer_format']}",
                test,
                f"{speeds['flashformer']:.2f}",
                f"{pair['share'][test]:.0%}" if test.startswith("tg") else "",
                f"{speeds[peer]:.2f}",
                f"{pair['ratio'][test]:.2f}",
            )
            rows.append((case, "| " + " | ".join(cells) + " |"))
    return rows


def bench_rows(result: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Case and line of every row of a plain benchmark."""
    rows = []
    for row in result["rows"]:
        batch = f" b{row['batch']}" if row["batch"] > 1 else ""
        depth = f" @ d{row['depth']}" if row["depth"] else ""
        case = (result["model"]["name"], row["format"], f"{row['test']}{batch}{depth}")
        cells = (
            *case,
            f"{row['tok_s']:.2f} ± {row['tok_s_spread']:.2f}",
            f"{row['ms_per_step']:.2f}",
            f"{row['gb_s']:.2f}",
            f"{row['share']:.0%}" if row["test"].startswith("tg") else "",
        )
        rows.append((case, "| " + " | ".join(cells) + " |"))
    return rows


def prompt_rows(result: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Case and line of every prompt of a measurement of prefill."""
    rows = []
    for model in result["models"]:
        for prompt in model["prompts"]:
            case = (model["name"], model["format"], str(prompt["tokens"]))
            cells = (*case, f"{prompt['first_token_ms']:.1f}", f"{prompt['tok_s']:.0f}")
            rows.append((case, "| " + " | ".join(cells) + " |"))
    return rows


def neighbour_rows(result: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Case and line of each engine beside a busy neighbour."""
    rows = []
    for engine, found in result["samples"].items():
        case = (result["model"]["name"], result["format"], engine)
        cells = (
            *case,
            f"{median(found['alone']):.2f}",
            f"{median(found['beside']):.2f}",
            f"{result['kept'][engine]:.0%}",
        )
        rows.append((case, "| " + " | ".join(cells) + " |"))
    return rows


KINDS = {
    "comparison": (COMPARISON, comparison_rows),
    "neighbour": (NEIGHBOUR, neighbour_rows),
    "prefill": (PROMPTS, prompt_rows),
}


if __name__ == "__main__":
    main()
