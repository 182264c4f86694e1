"""`flashformer plan`: who does which tile when, and where every byte lies."""

import sys
from typing import Annotated

import typer

from flashformer.codegen.header import render
from flashformer.plan.machine import MAX_BATCH
from flashformer.plan.show import show
from flashformer.serve import options
from flashformer.serve.load import LoadOptions, plan_of
from flashformer.serve.terminal import write_json

Batch = Annotated[
    int, typer.Option("--batch", "-b", min=1, max=MAX_BATCH, help="Sequences in one step.")
]
Source = Annotated[bool, typer.Option("--source", help="Print the CPU kernel's config.h instead.")]


def show_plan(
    model: options.ModelArgument = None,
    quant: options.Quant = None,
    context: options.Context = None,
    batch: Batch = 1,
    device: options.Device = "auto",
    threads: options.Threads = None,
    source: Source = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the plan of MODEL for this machine: stages, tiles, bytes. Reads no weights."""
    plan = plan_of(LoadOptions(model, device, quant, context, threads, batch))
    if as_json:
        write_json({"key": plan.key, **plan.to_json()})
    else:
        sys.stdout.write((render(plan) if source else show(plan)).rstrip("\n") + "\n")
