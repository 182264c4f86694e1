"""Measures the time to the first token on a GPU, and where it goes, on random weights.

python benchmarks/prefill.py [--shapes llama-3.1-8b] [--tokens 8,128,512,1024,8192] [--rows 2048]

Checks the logits of prompts against those of the kernel first and reports no time if they differ.
The result is a new JSON file in `benchmarks/results`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from flashformer.backends.cuda import CudaBackend, cuda_machine, prefill
from flashformer.backends.cuda.prefill_kernels import KernelOps
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import Plan, PlanOptions, make_plan
from flashformer.serve.benchmark.checks import ROUNDING
from flashformer.serve.benchmark.provenance import COMMIT_HELP, provenance, system
from flashformer.serve.benchmark.steps import Steps

RESULTS = Path(__file__).parent / "results"
CHECKED_TOKENS = 96  # of a prompt, compared with the kernel
WEIGHT_STD = 0.02
Pair = tuple[torch.cuda.Event, torch.cuda.Event]
PARTS: dict[str, list[tuple[Any, str]]] = {
    "unpack": [(KernelOps, "unpack")],
    "products": [(prefill, "multiply")],
    "attention": [(prefill, "attend")],
    "norms": [(KernelOps, "add_norm")],
    "heads": [(KernelOps, "split_heads")],
    "activation": [(KernelOps, "activate")],
    "pages": [(KernelOps, "load_pages"), (KernelOps, "store_pages")],
}


def main() -> None:
    """Measure every shape and chunk and write one result file."""
    options = parse_arguments()
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "prefill",
        **provenance(options.commit),
        "system": system(),
        "gpu": gpu(),
        "models": [
            measure_model(shape, rows, options)
            for shape in options.shapes.split(",")
            for rows in numbers(options.rows)
        ],
    }
    stem = f"{datetime.now(UTC):%Y-%m-%d-%H%M}-{result['gpu']['name'].lower().replace(' ', '-')}"
    path = options.output or RESULTS / f"{stem}-prefill.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
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
    backend = CudaBackend(plan, random_image(plan), pages)
    steps = Steps.of(backend)
    model: dict[str, Any] = {
        "name": shape,
        "weights": "random",
        "format": plan.options.format,
        "prompt_rows": rows,
        "workspace_bytes": prefill.workspace_bytes(plan),
        "checks": checks(backend, steps),
        "prompts": [],
    }
    print(shape, rows, json.dumps(model["checks"]), flush=True)
    if model["checks"]["passed"]:
        for tokens in lengths:
            model["prompts"].append(measure_prompt(steps, tokens, options.rounds))
            print(json.dumps(model["prompts"][-1]), flush=True)
    model["peak_bytes"] = torch.cuda.max_memory_allocated()
    backend.close()
    return model


def random_image(plan: Plan) -> torch.Tensor:
    """Weights of one size, norms of one, no biases, the true RoPE tables; made on the GPU."""
    image = torch.empty(plan.image_bytes, dtype=torch.uint8, device="cuda")
    torch.manual_seed(0)
    for part in image.view(torch.bfloat16).split(1 << 28):  # type: ignore[no-untyped-call]
        part.normal_(0, WEIGHT_STD)
    for vector in plan.vectors:
        end = vector.offset + 4 * vector.length
        values = image[vector.offset : end].view(torch.float32)
        if vector.name == "inv_freq":
            table = plan.spec.ropes[vector.layer].frequencies(plan.options.context)[0]
            values.copy_(torch.from_numpy(np.array(table)))
        else:
            values.fill_(0 if vector.name.endswith("bias") else 1)
    return image


def checks(backend: CudaBackend, steps: Steps) -> dict[str, Any]:
    """A prompt's last logits against the kernel's, and the kernel's next ones behind both."""
    ids = steps.random_ids(CHECKED_TOKENS + 1)
    ours = [steps.prompt(0, 0, ids[:-1]).logits.copy() for _ in range(2)]
    next_ours = steps.decode(ids[-1:], CHECKED_TOKENS, np.zeros(1, np.int32)).logits.copy()
    kernel = None
    for first in range(0, CHECKED_TOKENS, backend.plan.machine.max_rows):
        kernel = steps.prompt(1, first, ids[first : first + 8]).logits.copy()
    next_kernel = steps.decode(ids[-1:], CHECKED_TOKENS, np.ones(1, np.int32)).logits.copy()
    spread = float(np.std(next_kernel))
    limit = ROUNDING["bf16"] * spread
    difference = float(np.abs(ours[0] - kernel).max())
    next_difference = float(np.abs(next_ours - next_kernel).max())
    same_bits = ours[0].tobytes() == ours[1].tobytes()
    finite = bool(np.isfinite(ours[0]).all() and np.isfinite(next_kernel).all())
    return {
        "passed": finite and same_bits and 0 < difference <= limit and next_difference <= limit,
        "finite": finite,
        "repeat_bit_equal": same_bits,
        "largest_difference_to_kernel": difference / spread,
        "largest_difference_behind": next_difference / spread,
        "allowed": ROUNDING["bf16"],
    }


def measure_prompt(steps: Steps, tokens: int, rounds: int) -> dict[str, Any]:
    """Time from the token ids on the host to the logits on the host, and the parts of one run."""
    ids = steps.random_ids(tokens)
    for _ in range(2):
        steps.prompt(0, 0, ids)
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        steps.prompt(0, 0, ids)
        samples.append(time.perf_counter() - started)
    return {
        "tokens": tokens,
        "first_token_ms": median(samples) * 1e3,
        "tok_s": tokens / median(samples),
        "samples_ms": [1e3 * sample for sample in samples],
        "parts_ms": parts(lambda: steps.prompt(0, 0, ids)),
    }


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
