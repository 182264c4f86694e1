"""Measures changes of the kernel against each other, in turns in one process.

python benchmarks/variants.py llama-3.2-1b llama-3.1-8b/int4g128/int8:4096 -v . -v FOLDER -v .@6-3

A model is a shape, with the formats of its body and its head and a context if they are not bf16 and
128. A variant is a folder whose files take the place of those of kernel/ ('.': none), and copies in
flight (`copies_in_flight` of geometry.py) if not the usual ones. One sequence, greedy; a variant
that does not draw the tokens of the first is marked. A tool for the laboratory: no result file.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ablation import load
from flashformer.backends.base import Int32
from flashformer.backends.cuda import CudaBackend, cuda_machine
from flashformer.backends.cuda.compile import Cubin, build_cubin
from flashformer.backends.cuda.random_image import random_image
from flashformer.codegen.cuda_header import render_cuda
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import Plan, PlanOptions, make_plan
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.steps import Steps

TOKENS = 64
RUNS = 3  # of a variant in a round
READ_SECONDS = 0.03


@dataclass(frozen=True)
class Model:
    """What is decoded."""

    shape: str
    body: str = "bf16"
    head: str = "bf16"
    context: int = 128

    @classmethod
    def of(cls, text: str) -> "Model":
        """SHAPE[/BODY/HEAD][:CONTEXT]."""
        name, _, context = text.partition(":")
        shape, *formats = name.split("/")
        if shape not in SHAPES or len(formats) not in (0, 2) or not (context or "1").isdigit():
            raise argparse.ArgumentTypeError(
                f"{text!r} is no model: SHAPE[/BODY/HEAD][:CONTEXT] is expected"
            )
        return cls(shape, *formats, context=int(context or 128))


@dataclass(frozen=True)
class Variant:
    """A change of the kernel."""

    folder: Path
    in_flight: tuple[int, int] | None = None

    @classmethod
    def of(cls, text: str) -> "Variant":
        """FOLDER[@MOST-WHILE_HALF_FULL]."""
        folder, _, flight = text.partition("@")
        numbers = [int(number) for number in flight.split("-") if number.isdigit()]
        if not Path(folder).is_dir() or (flight and len(numbers) != 2):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no variant: FOLDER[@MOST-WHILE_HALF_FULL] is expected"
            )
        return cls(Path(folder), (numbers[0], numbers[1]) if flight else None)


def main() -> None:
    """Measure all variants of every model and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Model.of)
    parser.add_argument("-v", "--variant", action="append", type=Variant.of, required=True)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    options = parser.parse_args()
    for model in options.models:
        print(measure(model, options.variant, options.rounds), flush=True)


def cubin(plan: Plan, variant: Variant) -> Cubin:
    """A variant's code for one row."""
    header = render_cuda(plan, rows=1)
    folder = None if variant.folder == Path() else variant.folder
    return build_cubin(header, "decode", plan.machine.arch, folder, apart=True)


def measure(model: Model, variants: list[Variant], rounds: int) -> str:
    """A table of the variants; reads of the memory take turns with them."""
    spec = ModelSpec.from_hf(SHAPES[model.shape])
    context = model.context + 2 * TOKENS
    plan = make_plan(spec, cuda_machine(spec), PlanOptions(model.body, model.head, context, 1))
    with ThreadPoolExecutor() as pool:
        cubins = list(pool.map(lambda variant: cubin(plan, variant), variants))
    image = random_image(plan, torch.device("cuda"))
    backend = CudaBackend(plan, image, -(-context // plan.machine.page_tokens))
    steps, case = Steps.of(backend), Case("tg", TOKENS, model.context, 1)
    steps.fill([model.context], lambda *_: None)
    kernels = [load(plan, code) for code in cubins]
    micros: list[list[float]] = [[] for _ in variants]
    tokens: list[Int32] = []
    reads = []
    for _ in range(rounds + 1):  # the first to warm up
        backend.in_flight = None
        reads.append(backend.read_bandwidth(READ_SECONDS))
        tokens.clear()
        for variant, kernel, found in zip(variants, kernels, micros, strict=True):
            backend._kernels[1], backend.in_flight = kernel, variant.in_flight
            for _ in range(RUNS):
                started = time.perf_counter()
                drawn = steps.run(case).tokens
                found.append(1e6 * (time.perf_counter() - started) / TOKENS)
            tokens.append(drawn)
    nbytes = sum(plan.bytes_per_step(model.context + n + 1) for n in range(TOKENS)) / TOKENS
    backend.close()
    lines = [f"{model}: limit {median(reads):.0f} GB/s"]
    for variant, found, drawn, code in zip(variants, micros, tokens, cubins, strict=True):
        us = median(found[RUNS:])
        share = nbytes / us / 1e3 / median(reads)
        others = "" if np.array_equal(drawn, tokens[0]) else "  other tokens"
        flight = "{}-{}".format(*variant.in_flight) if variant.in_flight else ""
        spills = f"  spills {code.resources.spill_bytes}" if code.resources.spill_bytes else ""
        name = f"{variant.folder} {flight}"
        lines.append(f"  {name:<40}{us:>9.1f} us{share:>8.1%}{others}{spills}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
