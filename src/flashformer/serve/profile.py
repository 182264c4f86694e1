"""`flashformer profile`: where a token's microseconds go, from the kernel's own timeline.

-> a table, and a trace for ui.perfetto.dev
"""

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from flashformer.backends import machine_of, open_profiled
from flashformer.codegen.instruments import MOMENTS
from flashformer.errors import UsageError
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions
from flashformer.quant.formats import CHOICES, head_format
from flashformer.serve import options
from flashformer.serve.bench import Shape
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.provenance import provenance
from flashformer.serve.benchmark.run import find_model
from flashformer.serve.benchmark.steps import Steps
from flashformer.serve.benchmark.timeline import (
    Slice,
    StageTime,
    chrome_trace,
    producer_us,
    slices_of,
    stage_times,
    token_us,
    whole_steps,
)
from flashformer.serve.benchmark.waterfall import lines, waterfall
from flashformer.serve.terminal import Terminal, write_json

MAX_TRACED_STEPS = 16
Depth = Annotated[int, typer.Option("-d", min=0, help="Positions that a sequence already holds.")]
Batch = Annotated[int, typer.Option("-b", min=1, max=8, help="Sequences in a step.")]
Tokens = Annotated[
    int, typer.Option("-n", min=1, max=MAX_TRACED_STEPS, help="Tokens; the first is not counted.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="The trace, Chrome's JSON: open it in Perfetto.")
]


def profile(
    model: options.ModelArgument = None,
    model_shape: Shape = None,
    depth: Depth = 128,
    batch: Batch = 1,
    tokens: Tokens = 3,
    quant: options.Quant = None,
    device: options.Device = "auto",
    output: Output = Path("flashformer-trace.json"),
    commit: options.Commit = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Record what every SM does during a few tokens: a trace, and where a token's time goes."""
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: the folder {output.parent} does not exist; make it first")
    found = find_model(model, model_shape)
    name = quant or found.stored_format
    head = head_format(name, "cuda") if name in CHOICES else name  # the one kind that is profiled
    plan_options = PlanOptions(name, head, context=depth + tokens, max_batch=batch)
    case = Case("tg", tokens, depth, batch)
    with Terminal(quiet=quiet) as terminal:
        machine = machine_of(device, found.spec)
        backend = open_profiled(
            device,
            found.spec,
            found.weights,
            plan_options,
            num_pages=-(-plan_options.context // machine.page_tokens) * batch,
            trace_moments=moments_of(found.spec, tokens),
            progress=terminal.progress,
        )
        with closing(backend):
            steps = Steps.of(backend)
            if depth:
                steps.fill([depth] * batch, terminal.progress)
            for _ in range(2):  # the second finds the kernel and the page table in place
                steps.run(case)
            slices = whole_steps(slices_of(backend.timeline()))
            bytes_per_step = backend.plan.bytes_per_step(depth + tokens, batch)
            read_gb_s = backend.read_bandwidth()
    title = f"{found.name} {name}, batch {batch}, context {depth}"
    output.write_text(json.dumps(chrome_trace(slices, title), separators=(",", ":")))
    parts = waterfall(slices, bytes_per_step, read_gb_s)
    document = {
        **provenance(commit),
        **to_json(title, slices, bytes_per_step, output),
        "gpu": {"name": machine.name},
        "read_gb_s": read_gb_s,
        "waterfall": [asdict(part) for part in parts],
    }
    if as_json:
        write_json(document)
    else:
        told = [to_text(document, stage_times(slices)), "", *lines(parts, read_gb_s)]
        sys.stdout.write("\n".join(told if parts else told[:1]) + "\n")


def moments_of(spec: ModelSpec, tokens: int) -> int:
    """Moments of the busier track: at most one of each kind a layer, and of each a token."""
    return 1 + tokens * len(MOMENTS) * (spec.num_layers + 1)


def to_json(
    title: str, slices: Sequence[Slice], bytes_per_step: int, trace: Path
) -> dict[str, Any]:
    """Everything that is printed, by name."""
    wall = token_us(slices)
    return {
        "schema": 1,
        "kind": "profile",
        "what": title,
        "token_us": wall,
        "bytes_per_token": bytes_per_step,
        "gb_s": bytes_per_step / median(wall) / 1e3 if wall else None,
        "stages": [{**asdict(row), "total_us": row.total_us} for row in stage_times(slices)],
        "producer_us": producer_us(slices),
        "trace": str(trace),
    }


def to_text(document: dict[str, Any], rows: Sequence[StageTime]) -> str:
    """The table for people; times are medians over the CTAs, all layers of a token together."""
    table = [["stage", "calls", "work µs", "max", "wait µs", "max", "ring empty µs", "share"]]
    for row in rows:
        numbers = (row.work_us, row.work_max_us, row.wait_us, row.wait_max_us, row.ring_us)
        cells = [f"{number:.1f}" for number in numbers]
        table.append([row.stage, str(row.calls), *cells, f"{100 * row.share:.1f} %"])
    lines = aligned(table)
    if not document["token_us"]:
        return f"{document['what']}: no whole token was recorded"
    producer = document["producer_us"]
    return "\n".join(
        [
            f"{document['what']}: {median(document['token_us']):.1f} µs a token with the timeline "
            f"compiled in, {document['gb_s']:.0f} GB/s",
            "",
            *lines,
            "",
            f"producer: ring full {producer['ring_full']:.1f} µs, waiting for copies "
            f"{producer['copies_under_way']:.1f} µs of {producer['all']:.1f} µs",
            f"trace: {document['trace']} (open it in ui.perfetto.dev)",
        ]
    )


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
