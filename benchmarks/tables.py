"""Writes the README's tables of speed from the result files.

python benchmarks/tables.py [--check]
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from generated import between_marks, load_results, rewrite
from roofline import roofline

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PICTURE = ROOT / "docs" / "roofline.svg"
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

SUITE = (
    "| model | context | batch | tok/s | µs/step | GB/s of limit | reached | target | met |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---|",
)
BASELINES = (
    "| model | context | decoded by | tok/s | µs/token | share of limit | time against ours |",
    "|---|---:|---|---:|---:|---:|---:|",
)
STARTUP = (
    "| model | loading | seconds | at most |",
    "|---|---|---:|---:|",
)
INTERRUPT = (
    "| model | a second sequence | ms/token | median ms | p99 ms | longest ms | at most | met |",
    "|---|---|---:|---:|---:|---:|---:|---|",
)
ABLATION = (
    "| model | the kernel | µs/token | share of limit | against the kernel, µs |",
    "|---|---|---:|---:|---:|",
)


Line = tuple[tuple[str, ...], tuple[str, ...]]  # what tells cases apart, and the cells


def main() -> None:
    """Rewrite the README and the picture, or with --check only say whether they are up to date."""
    results = load_results(RESULTS)
    readme = ROOT / "README.md"
    made = {readme: with_tables(readme.read_text(), results)}
    if picture := roofline(results):
        made[PICTURE] = picture
    rewrite(made, __doc__)


def with_tables(readme: str, results: list[dict[str, Any]]) -> str:
    """The README with the text between the two marks replaced."""
    return between_marks(readme, tables(results))


def tables(results: list[dict[str, Any]]) -> str:
    """One table for each kind of result and machine; of equal cases the newest counts."""
    newest: dict[tuple[str, str], dict[tuple[str, ...], tuple[str, str]]] = {}
    heads: dict[tuple[str, str], tuple[str, ...]] = {}
    order = [*KINDS]
    for result in sorted(results, key=lambda result: order.index(result["kind"])):
        subject, head, rows_of = KINDS[result["kind"]]
        place = (subject, title(result))
        peer = result["peer"]["name"] if "peer" in result else ""
        heads[place] = tuple(line.format(peer=peer) for line in head)
        rows = newest.setdefault(place, {})
        for case, cells in rows_of(result):
            rows[case] = (f"| {' | '.join(cells)} |", result["file"])
    has_picture = any(result["kind"] == "suite" for result in results)
    parts = ["\n![Every model below the roof](docs/roofline.svg)\n"] if has_picture else []
    subjects: set[str] = set()
    for place, rows in newest.items():
        if place[0] not in subjects:
            parts.append(f"\n### {place[0]}\n")
        subjects.add(place[0])
        files = sorted({file for _, file in rows.values()})
        links = ", ".join(
            f"[{number}](benchmarks/results/{f})" for number, f in enumerate(files, 1)
        )
        lines = [f"\n{place[1]} (files {links}):\n", *heads[place]]
        parts.append("\n".join([*lines, *(line for line, _ in rows.values())]) + "\n")
    return "".join(parts) + "\n" if parts else "\nNo result file is checked in yet.\n\n"


def title(result: dict[str, Any]) -> str:
    """The machine in a few words."""
    if "gpu" in result:
        return f"**{result['gpu']['name']}**"
    alone = result["kind"] == "bench"
    cpu = result["machine" if alone else "system"]["cpu"]
    threads = result["machine"]["threads"] if alone else result["threads"]
    return f"**{cpu}, {threads} threads**"


def comparison_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of every row of a comparison."""
    peer = result["peer"]["name"]
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
            yield case, cells


def bench_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of every row of a plain benchmark."""
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
        yield case, cells


def prompt_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of every prompt of a measurement of prefill."""
    for model in result["models"]:
        for prompt in model["prompts"]:
            case = (model["name"], model["format"], str(prompt["tokens"]))
            cells = (*case, f"{prompt['first_token_ms']:.1f}", f"{prompt['tok_s']:.0f}")
            yield case, cells


def suite_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of every row of a suite."""
    for model in result["models"]:
        limit = median(model["read_gb_s"]) if model["read_gb_s"] else 0.0
        for reached in model["reached"]:
            row, share = reached["row"], reached["what"] == "share"
            sign, bound = "≥" if share else "≤", reached["bound"]
            cells = (
                f"{model['loaded']['shape']} {model['loaded']['format']}",
                str(row["depth"]),
                str(row["batch"]),
                f"{row['tok_s']:.1f}",
                f"{1e3 * row['ms_per_step']:.0f}",
                f"{row['gb_s']:.0f} of {limit:.0f}",
                amount(reached["what"], reached["value"]),
                "" if bound is None else f"{sign} {amount(reached['what'], bound)}",
                {True: "yes", False: "no", None: ""}[reached["met"]],
            )
            yield (reached["name"],), cells


def amount(what: str, value: float) -> str:
    """A value of a suite with what it is."""
    if what == "share":
        return f"{value:.1%}"
    return f"{value:.3f} x" if what == "step ratio" else f"p99 {value:.3f} x median"


def baseline_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of every peer beside the whole-model kernel."""
    for model in result["models"]:
        for peer in model["peers"]:
            case = (model["name"], str(model["context"]), peer["name"])
            cells = (
                *case,
                f"{1e6 / peer['us_per_token']:.1f}",
                f"{peer['us_per_token']:.0f}",
                f"{peer['share']:.1%}",
                f"{peer['times_ours']:.2f} x",
            )
            yield case, cells


def ablation_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of every part that was taken out of the kernel."""
    for model in result["models"]:
        for variant in model["variants"]:
            case = (model["name"], variant["name"])
            cells = (
                *case,
                f"{variant['us_per_token']:.0f}",
                f"{variant['share']:.1%}",
                f"{variant['us_per_token'] - model['variants'][0]['us_per_token']:+.0f}",
            )
            yield case, cells


def startup_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of each part of a start."""
    for what, words in STARTS.items():
        limit = result["limits"].get(what)
        seconds = f"{result['seconds'][what]:.2f}"
        yield (
            (result["shape"], what),
            (result["shape"], words, seconds, "" if limit is None else f"{limit:.0f}"),
        )


def interrupt_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of each way to end a launch of many tokens."""
    for model in result["models"]:
        for row in model["rows"]:
            case = (model["name"], {"join": "joins", "cancel": "is cancelled"}[row["what"]])
            cells = (
                *case,
                f"{model['token_ms']:.2f}",
                *(f"{row[what]:.2f}" for what in ("p50_ms", "p99_ms", "max_ms")),
                f"{result['limit_ms']:.1f}",
                "yes" if row["met"] else "no",
            )
            yield case, cells


def neighbour_rows(result: dict[str, Any]) -> Iterator[Line]:
    """Case and cells of each engine beside a busy neighbour."""
    for engine, found in result["samples"].items():
        case = (result["model"]["name"], result["format"], engine)
        cells = (
            *case,
            f"{median(found['alone']):.2f}",
            f"{median(found['beside']):.2f}",
            f"{result['kept'][engine]:.0%}",
        )
        yield case, cells


STARTS = {
    "compile": "compiling a new model",
    "load": "all of its first load, packing included",
    "compile_known": "finding its kernel again",
    "load_known": "all of a later load",
    "first_token_known": "from the start of Python to the first token",
}
# kind of a result -> heading, the table's head, its rows; in the README's order
KINDS = {
    "suite": ("Decoding, as a share of what the memory gives", SUITE, suite_rows),
    "baselines": ("The same model, decoded by others", BASELINES, baseline_rows),
    "prefill": ("Prompts", PROMPTS, prompt_rows),
    "ablation": ("What each idea of the kernel is worth", ABLATION, ablation_rows),
    "interrupt": ("From a call to the next launch", INTERRUPT, interrupt_rows),
    "startup": ("From files to the first token", STARTUP, startup_rows),
    "comparison": ("In turns with a peer, on a CPU", COMPARISON, comparison_rows),
    "neighbour": ("Beside a busy neighbour, on a CPU", NEIGHBOUR, neighbour_rows),
    "bench": ("Alone", ALONE, bench_rows),
}


if __name__ == "__main__":
    main()
