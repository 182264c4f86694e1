"""Measures the time to the first token on a GPU, and where it goes, on random weights.

python benchmarks/prefill.py [--shapes llama-3.1-8b] [--tokens 8,128,512,1024,8192] [--rows 2048]

Checks first how far a prompt's logits are from float32, and reports no time if they are further
than those of transformers in bf16. The result is a new JSON file in `benchmarks/results`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flashformer.backends.cuda import CudaBackend, cuda_machine, prefill
from flashformer.backends.cuda.prefill_kernels import KernelOps
from flashformer.backends.cuda.random_image import random_image
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.serve.benchmark.provenance import COMMIT_HELP
from flashformer.serve.benchmark.steps import Steps
from prefill_checks import checks
from result_file import begin, new_path, save

Pair = tuple[torch.cuda.Event, torch.cuda.Event]
PARTS: dict[str, list[tuple[Any, str]]] = {
    "unpack": [(KernelOps, "unpack")],
    "products": [(prefill, "multiply")],
    "attention": [(prefill, "attend"), (prefill, "attend_in_blocks")],
    "norms": [(KernelOps, "add_norm")],
    "heads": [(KernelOps, "split_heads")],
    "activation": [(KernelOps, "activate")],
    "pages": [(KernelOps, "load_pages"), (KernelOps, "store_pages")],
}


def main() -> None:
    """Measure every shape and chunk and write one result file."""
    options = parse_arguments()
    result = {**begin("prefill", options.commit), "gpu": gpu(), "models": []}
    path = options.output or new_path(result["gpu"]["name"], "prefill")
    for shape in options.shapes.split(","):
        for rows in numbers(options.rows):
            result["models"].append(measure_model(shape, rows, options))
            save(path, result)
    print(path)
    if not all(model["checks"]["passed"] for model in result["models"]):
        raise SystemExit("a check failed; see the file")


def parse_arguments() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama-3.1-8b,llama-3.2-1b", help="of model/shapes.py")
    parser.add_argument("--tokens", default="8,128,512,1024,8192", help="of the prompts")
    parser.add_argument("--rows", default="2048", help="of a chunk, one measurement each")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--commit", help=COMMIT_HELP)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    return [int(part) for part in text.split(",")]


def gpu() -> dict[str, Any]:
    """The GPU and the libraries that compute."""
    return {
        "name": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def measure_model(shape: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Checks, then the times of every prompt length."""
    spec = ModelSpec.from_hf(SHAPES[shape])
    lengths = numbers(options.tokens)
    machine = replace(cuda_machine(spec), prompt_rows=rows)
    plan = make_plan(spec, machine, PlanOptions("bf16", "bf16", max(*lengths, 1024) + 64, 2))
    pages = 2 * -(-plan.options.context // machine.page_tokens)
    image = random_image(plan, torch.device("cuda"))
    backend = CudaBackend(plan, image, pages)
    backend.warm_up()
    steps = Steps.of(backend)
    model: dict[str, Any] = {
        "name": shape,
        "weights": "random",
        "format": plan.options.format,
        "prompt_rows": rows,
        "workspace_bytes": prefill.workspace_bytes(plan),
        "checks": checks(backend, steps, image, SHAPES[shape]),
        "prompts": [],
    }
    print(shape, rows, json.dumps(model["checks"]), flush=True)
    if model["checks"]["passed"]:
        for tokens in lengths:
            model["prompts"].append(measure_prompt(steps, tokens, options.rounds))
            print(show(model["prompts"][-1]), flush=True)
    model["peak_bytes"] = torch.cuda.max_memory_allocated()
    backend.close()
    return model


def measure_prompt(steps: Steps, tokens: int, rounds: int) -> dict[str, Any]:
    """Time from the token ids on the host to the logits on the host, and the parts of more runs."""
    ids = steps.random_ids(tokens)
    for _ in range(2):
        steps.prompt(0, 0, ids)
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        steps.prompt(0, 0, ids)
        samples.append(1e3 * (time.perf_counter() - started))
    found = [parts(lambda: steps.prompt(0, 0, ids)) for _ in range(rounds)]
    parts_samples = {name: [run[name] for run in found] for name in found[0]}
    first_token = median(samples)
    return {
        "tokens": tokens,
        "first_token_ms": first_token,
        "tok_s": 1e3 * tokens / first_token,
        "samples_ms": samples,
        "parts_ms": {name: median(times) for name, times in parts_samples.items()},
        "parts_samples_ms": parts_samples,
    }


def show(prompt: dict[str, Any]) -> str:
    """One line: the time, its range, and what each part takes."""
    low, high = min(prompt["samples_ms"]), max(prompt["samples_ms"])
    cells = [f"{name} {ms:.2f}" for name, ms in prompt["parts_ms"].items() if ms > 0]
    return (
        f"{prompt['tokens']:6d} tokens {prompt['first_token_ms']:8.2f} ms ({low:.2f} to {high:.2f})"
        f", {prompt['tok_s']:.0f} tok/s; on the GPU, with events between: {', '.join(cells)}"
    )


def parts(run: Callable[[], Any]) -> dict[str, float]:
    """GPU milliseconds of each part of one run, between events around every call."""
    marks: dict[str, list[Pair]] = {name: [] for name in PARTS}
    with watched(marks):
        begin, end = event(), event()
        begin.record()
        run()
        end.record()
        end.synchronize()
    total = begin.elapsed_time(end)
    found = {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in marks.items()}
    return {**found, "other": total - sum(found.values()), "total": total}


@contextmanager
def watched(marks: dict[str, list[Pair]]) -> Iterator[None]:
    """Within it, the functions of PARTS leave an event before and behind each call."""
    originals = [(owner, name, getattr(owner, name)) for w in PARTS.values() for owner, name in w]

    def watch(function: Callable[..., object], pairs: list[Pair]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            pairs.append((event(), event()))
            pairs[-1][0].record()
            result = function(*arguments)
            pairs[-1][1].record()
            return result

        return call

    try:
        for part, functions in PARTS.items():
            for owner, name in functions:
                setattr(owner, name, watch(getattr(owner, name), marks[part]))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def event() -> torch.cuda.Event:
    """One that knows its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
