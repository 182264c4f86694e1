"""`flashformer bench`: speed against the machine's own read bandwidth, after a check of the maths.

MODEL or a shape -> table, or JSON with all samples
"""

import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import typer

from flashformer.backends import machine_of, open_backend
from flashformer.errors import FlashFormerError, UsageError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights, RandomWeights, WeightSource
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import FORMATS
from flashformer.serve import options
from flashformer.serve.benchmark.cases import Case, make_cases, parse_numbers
from flashformer.serve.benchmark.checks import PROMPT_TOKENS, Checks, run_checks
from flashformer.serve.benchmark.measure import Measured, measure
from flashformer.serve.benchmark.provenance import provenance, system
from flashformer.serve.benchmark.report import OUTPUTS, Row, csv_text, jsonl_text, make_row, table
from flashformer.serve.benchmark.steps import Steps
from flashformer.serve.inspect import num_parameters
from flashformer.serve.load import open_checkpoint
from flashformer.serve.speed import ReadsMemory
from flashformer.serve.terminal import Terminal, write_json

Shape = Annotated[
    str | None,
    typer.Option("--model-shape", help="Random weights in the shape of: " + ", ".join(SHAPES)),
]
Prompts = Annotated[str, typer.Option("-p", help="Prompt lengths; 0 for none.")]
Generations = Annotated[str, typer.Option("-n", help="Tokens to generate; 0 for none.")]
Depths = Annotated[str, typer.Option("-d", help="Positions that a sequence already holds.")]
Batches = Annotated[str, typer.Option("-b", help="Sequences in a step.")]
Repeats = Annotated[int, typer.Option("-r", min=1, help="Rounds.")]
Formats = Annotated[
    str | None,
    typer.Option("--quant", help="Weight formats: " + ", ".join(FORMATS) + ". Default: as stored."),
]
Output = Annotated[str, typer.Option("-o", "--output", help=" or ".join(OUTPUTS))]


@dataclass(frozen=True, slots=True)
class Model:
    """What is measured."""

    name: str
    spec: ModelSpec
    weights: WeightSource
    stored_format: str


@dataclass(frozen=True, slots=True)
class Result:
    """One weight format: the checks, the speeds, the machine."""

    image_bytes: int
    backend: str
    checks: Checks
    read_gb_s: list[float]
    rows: list[Row]


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
    commit: options.Commit = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure prompts and decoding, and say which share of the machine's bandwidth they reach."""
    if output not in OUTPUTS:
        raise UsageError(f"-o takes {', '.join(OUTPUTS)}, not {output!r}")
    cases = make_cases(
        parse_numbers("-p", prompts),
        parse_numbers("-n", generations),
        parse_numbers("-d", depths),
        parse_numbers("-b", batches),
    )
    with Terminal(quiet=quiet) as terminal:
        where_from = provenance(commit)
        found = find_model(model, model_shape)
        machine = {**machine_json(device, found.spec, threads), **system()}
        names = quant.split(",") if quant else [found.stored_format]
        results = [run_format(found, n, cases, repeats, device, threads, terminal) for n in names]
    document = {**where_from, **to_json(found, machine, results)}
    if as_json or output == "json":
        write_json(document)
    else:
        sys.stdout.write(to_text(found, document, results, output) + "\n")


def find_model(model: str | None, shape: str | None) -> Model:
    """A checkpoint, random weights of a shape, or the embedded default."""
    if shape is None:
        checkpoint = open_checkpoint(model)
        spec = ModelSpec.from_hf(checkpoint.config, checkpoint.generation_config)
        stored = CheckpointWeights(checkpoint, spec)
        return Model(checkpoint.folder.name, spec, stored, stored.dtype)
    if model is not None:
        raise UsageError("give a model or --model-shape, not both")
    if shape not in SHAPES:
        raise UsageError(f"--model-shape takes {', '.join(SHAPES)}, not {shape!r}")
    spec = ModelSpec.from_hf(SHAPES[shape])
    return Model(f"{shape} (random)", spec, RandomWeights(spec), "bf16")


def run_format(
    model: Model,
    weight_format: str,
    cases: list[Case],
    repeats: int,
    device: str,
    threads: int | None,
    terminal: Terminal,
) -> Result:
    """Check, then measure every case in one weight format."""
    plan_options = PlanOptions(
        format=weight_format,
        head_format=weight_format,
        context=max(PROMPT_TOKENS + 1, *(case.context for case in cases)),
        max_batch=max(case.batch for case in cases),
    )
    machine = machine_of(device, model.spec, threads)
    plan = make_plan(model.spec, machine, plan_options)
    pages = -(-plan_options.context // machine.page_tokens) * plan_options.max_batch
    backend = open_backend(
        device,
        plan.spec,
        model.weights,
        plan_options,
        num_pages=pages,
        threads=threads,
        progress=terminal.progress,
    )
    terminal.clear()
    with closing(backend):
        if not isinstance(backend, ReadsMemory):
            raise UsageError(f"bench cannot measure the memory of device {machine.kind}; use cpu")
        steps = Steps.of(backend)
        checks = run_checks(steps, plan_options.max_batch)
        if not checks.passed:
            raise FlashFormerError(
                f"the {weight_format} kernel fails the checks {', '.join(checks.failed())}, so no "
                "speed is reported; please report this"
            )
        measured: Measured = measure(
            steps, cases, repeats, backend.read_bandwidth, terminal.progress
        )
        terminal.clear()
    rows = [make_row(case, plan, measured) for case in cases]
    workers = "threads" if machine.kind == "cpu" else "CTAs"
    kind = f"{machine.kind} {machine.arch}, {machine.num_ctas} {workers}"
    return Result(plan.image_bytes, kind, checks, measured.read_gb_s, rows)


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
