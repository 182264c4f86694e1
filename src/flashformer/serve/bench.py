"""`flashformer bench`: speed against the machine's own read bandwidth, after a check of the maths.

MODEL or a shape -> table, or JSON with all samples
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from flashformer.backends import machine_of
from flashformer.errors import UsageError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.quant.formats import CHOICES, head_format
from flashformer.serve import options
from flashformer.serve.benchmark import suite as suites
from flashformer.serve.benchmark.cases import make_cases, parse_numbers
from flashformer.serve.benchmark.provenance import provenance, system
from flashformer.serve.benchmark.report import OUTPUTS, csv_text, jsonl_text, table
from flashformer.serve.benchmark.run import (
    Model,
    Result,
    Setup,
    check_and_measure,
    find_model,
    opened,
)
from flashformer.serve.benchmark.targets import SUITES, targets_of
from flashformer.serve.inspect import num_parameters
from flashformer.serve.terminal import Terminal, finite, write_json

Shape = Annotated[
    str | None,
    typer.Option("--model-shape", help="Random weights in the shape of: " + ", ".join(SHAPES)),
]
Prompts = Annotated[str, typer.Option("-p", help="Prompt lengths, with commas; 0 for none.")]
Generations = Annotated[
    str, typer.Option("-n", help="Tokens to generate, with commas; 0 for none.")
]
Depths = Annotated[
    str, typer.Option("-d", help="Positions that a sequence already holds, with commas.")
]
Batches = Annotated[str, typer.Option("-b", help="Sequences in a step, with commas.")]
Repeats = Annotated[int, typer.Option("-r", min=1, help="Rounds.")]
Formats = Annotated[
    str | None,
    typer.Option(
        "--quant",
        help="Weight formats, with commas: " + ", ".join(CHOICES) + ". Default: as stored.",
    ),
]
Output = Annotated[str, typer.Option("-o", "--output", help=" or ".join(OUTPUTS))]
Suite = Annotated[
    str | None,
    typer.Option(help="A table of models and targets in place of one model: " + ", ".join(SUITES)),
]
Only = Annotated[
    str | None, typer.Option(help="Rows of the suite, with commas and *: 8b-bf16-*,1b-bf16-c32.")
]
Save = Annotated[
    Path | None, typer.Option(help="The result file; of a suite, written after every model.")
]


def bench(
    model: options.ModelArgument = None,
    model_shape: Shape = None,
    prompts: Prompts = "128",
    generations: Generations = "128",
    depths: Depths = "0",
    batches: Batches = "1",
    repeats: Repeats = 5,
    quant: Formats = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    output: Output = "md",
    suite: Suite = None,
    only: Only = None,
    save: Save = None,
    commit: options.Commit = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure prompts and decoding, and say which share of the machine's bandwidth they reach."""
    if output not in OUTPUTS:
        raise UsageError(f"-o takes {', '.join(OUTPUTS)}, not {output!r}")
    if save is not None:
        check_file(save)  # before minutes of measuring
    where_from = provenance(commit)
    as_json = as_json or output == "json"
    if suite is not None:
        if any(given is not None for given in (model, model_shape, quant)):
            raise UsageError("--suite has models and formats of its own; give --only to choose")
        if output in ("csv", "jsonl"):
            raise UsageError(f"--suite prints md or json, not {output}")
        return run_suite(suite, only, save, repeats, device, where_from, as_json, quiet)
    if only is not None:
        raise UsageError("--only chooses rows of a suite; give --suite with it")
    cases = make_cases(
        parse_numbers("-p", prompts),
        parse_numbers("-n", generations),
        parse_numbers("-d", depths),
        parse_numbers("-b", batches),
    )
    with Terminal(quiet=quiet) as terminal:
        found = find_model(model, model_shape)
        machine = {**machine_json(device, found.spec, threads), **system()}
        results = []
        for name in quant.split(",") if quant else [found.stored_format]:
            head = head_format(name, machine["kind"]) if name in CHOICES else name
            setup = Setup(name, head, tuple(cases), repeats, device, threads)
            with opened(found, setup, terminal) as steps:
                results.append(check_and_measure(steps, setup, terminal))
    document = {**where_from, **to_json(found, machine, results)}
    if save is not None:
        write_file(save, document)
    if as_json:
        write_json(document)
    else:
        sys.stdout.write(to_text(found, document, results, output) + "\n")


def run_suite(
    suite: str,
    only: str | None,
    save: Path | None,
    repeats: int,
    device: str,
    where_from: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a suite; its rows are told and saved as they come. Exits with 1 if a model failed."""
    targets = targets_of(suite, only)
    machine = machine_of(device, find_model(None, targets[0].loaded.shape).spec)
    if device == "auto" and machine.kind != "cuda":
        raise UsageError(
            f"the targets of suite {suite} are a GPU's and none was found; --device cpu measures "
            "its models all the same, which takes hours"
        )
    document = {
        "schema": 1,
        "kind": "suite",
        **where_from,
        "suite": suite,
        "gpu": {"name": machine.name, "arch": machine.arch},
        "system": system(),
        "models": [],
    }
    outcomes: list[suites.Outcome] = []
    with Terminal(quiet=quiet) as terminal:
        for outcome in suites.run_suite(targets, repeats, device, terminal):
            outcomes.append(outcome)
            for told in suites.table([outcome]).splitlines()[2:]:
                terminal.note(told)
            document["models"] = [asdict(o) for o in outcomes]
            if save is not None:
                write_file(save, document)
    if as_json:
        write_json(document)
    else:
        sys.stdout.write(suites.table(outcomes) + "\n")
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def check_file(path: Path) -> None:
    """Raise `UsageError` if a result file cannot be written; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--save {path}: the folder cannot be made: {error.strerror}; choose another"
        ) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--save {path} cannot be written; name a file in a folder of yours")


def write_file(path: Path, document: dict[str, Any]) -> None:
    """A result file."""
    path.write_text(json.dumps(finite(document), indent=1, ensure_ascii=False) + "\n")


def machine_json(device: str, spec: ModelSpec, threads: int | None) -> dict[str, Any]:
    """The planner's machine, by the names that a result file uses."""
    machine = machine_of(device, spec, threads)
    return {"kind": machine.kind, "arch": machine.arch, "threads": machine.num_ctas}


def to_json(model: Model, machine: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """The result file."""
    reads = [sample for result in results for sample in result.read_gb_s]
    return {
        "schema": 1,
        "kind": "bench",
        "machine": {
            **machine,
            "load_after": round(os.getloadavg()[0], 2),
            "read_gb_s": median(reads),
            "read_samples": reads,
        },
        "model": {
            "name": model.name,
            "model_type": model.spec.model_type,
            "parameters": num_parameters(model.spec),
        },
        "checks": {
            result.rows[0].format: {**asdict(result.checks), "passed": result.checks.passed}
            for result in results
        },
        "rows": [asdict(row) for result in results for row in result.rows],
    }


def to_text(model: Model, document: dict[str, Any], results: list[Result], output: str) -> str:
    """The table, CSV or JSON lines."""
    rows = [row for result in results for row in result.rows]
    if output == "csv":
        return csv_text(rows)
    if output == "jsonl":
        return jsonl_text(rows)
    parameters = document["model"]["parameters"]
    lines: list[str] = []
    for result in results:
        text = table(result.rows, model.name, result.image_bytes, parameters, result.backend)
        lines += text.splitlines()[2 if lines else 0 :]
    machine = document["machine"]
    lines += [
        "",
        f"read bandwidth {machine['read_gb_s']:.2f} GB/s on {machine['cpu']}, "
        f"load {machine['load_before']}; checks passed",
    ]
    return "\n".join(lines)
