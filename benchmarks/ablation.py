"""Measures what the kernel's ideas are worth: the same kernel with one of them taken out, in turns.

python benchmarks/ablation.py [--shapes llama-3.2-1b,llama-3.1-8b] [-o FILE]

ablate.cu includes the decoder and replaces one thing. All variants run in one process on the same
random weights, one sequence at context 128; all must draw the kernel's tokens, but the one that
adds in another order, whose logits are compared.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from flashformer.backends.base import Float32, Int32
from flashformer.backends.cuda import CudaBackend, cuda_machine
from flashformer.backends.cuda.compile import Cubin, build_cubin
from flashformer.backends.cuda.geometry import most_in_flight
from flashformer.backends.cuda.launch import Kernel
from flashformer.backends.cuda.random_image import random_image
from flashformer.codegen.cuda_header import render_cuda
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.plan.plan import Plan, PlanOptions, make_plan
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.checks import rounding_of
from flashformer.serve.benchmark.provenance import COMMIT_HELP
from flashformer.serve.benchmark.steps import Steps
from result_file import begin, new_path, save

HERE = Path(__file__).parent
CASE = Case("tg", 64, 128, 1)
THREADS = 320
WHOLE = "as it is"
FFMA = "products by FFMA, not on the tensor cores"
UNBOUNDED = "as many slots of the ring on their way as can be"
STEADY = "as many copies on their way however full the ring is"
# name -> what ablate.cu is told; UNBOUNDED and STEADY are arguments of the launch (`use`)
VARIANTS = {
    WHOLE: "",
    "the ring stops at every stage's end": "ABLATE_RING",
    UNBOUNDED: "",
    STEADY: "",
    FFMA: "ABLATE_TENSOR_CORES",
    "all CTAs meet at a barrier after every stage": "ABLATE_PACKETS",
}


def main() -> None:
    """Measure every shape and write one result file."""
    options = parse_arguments()
    gpu = torch.cuda.get_device_name(0)
    path = options.output or new_path(gpu, "ablation")
    result = {**begin("ablation", options.commit), "gpu": {"name": gpu}, "models": []}
    for shape in options.shapes.split(","):
        result["models"].append(measure(shape, options.rounds))
        save(path, result)
        for variant in result["models"][-1]["variants"]:
            print({k: v for k, v in variant.items() if k != "samples_us"}, flush=True)
    if not all(v["right"] for model in result["models"] for v in model["variants"]):
        raise SystemExit("a variant computes something else; see the file")


def parse_arguments() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama-3.2-1b,llama-3.1-8b", help="of model/shapes.py")
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--commit", help=COMMIT_HELP)
    return parser.parse_args()


def variant_cubin(plan: Plan, told: str) -> Cubin:
    """The decoder for one row with what `told` (a value of VARIANTS) takes out."""
    header = render_cuda(plan, rows=1)
    return build_cubin(f"#define {told or 'WHOLE'}\n{header}", "ablate", plan.machine.arch, HERE)


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """Check every variant, then time all in turns, a read of the memory before each."""
    spec = ModelSpec.from_hf(SHAPES[shape])
    plan = make_plan(spec, cuda_machine(spec), PlanOptions("bf16", "bf16", 256, 1))
    image = random_image(plan, torch.device("cuda"))
    backend = CudaBackend(plan, image, 256 // plan.machine.page_tokens)
    steps = Steps.of(backend)
    steps.fill([CASE.depth], lambda *_: None)
    kernels = {told: kernel(backend, told) for told in dict.fromkeys(VARIANTS.values())}
    right = {}
    expected: tuple[Int32, Float32] | None = None
    for name in VARIANTS:
        use(backend, name, kernels)
        found = drawn(backend, steps)
        expected = expected or found
        right[name] = is_right(name, found, expected, rounding_of(plan))
    samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
    reads = []
    for _ in range(rounds):
        for name in VARIANTS:
            use(backend, WHOLE, kernels)
            reads.append(backend.read_bandwidth(0.05))
            use(backend, name, kernels)
            started = time.perf_counter()
            steps.run(CASE)
            samples[name].append(1e6 * (time.perf_counter() - started) / CASE.tokens)
    backend.close()
    nbytes = sum(plan.bytes_per_step(CASE.depth + n + 1) for n in range(CASE.tokens)) / CASE.tokens
    limit = median(reads)
    return {
        "name": shape,
        "context": CASE.depth,
        "bytes_per_token": nbytes,
        "read_gb_s": reads,
        "variants": [
            {
                "name": name,
                "right": right[name],
                "us_per_token": median(found),
                "share": nbytes / median(found) / 1e3 / limit,
                "samples_us": found,
            }
            for name, found in samples.items()
        ],
    }


def use(backend: CudaBackend, name: str, kernels: dict[str, Kernel]) -> None:
    """Let the next steps of one row run a variant."""
    backend._kernels[1] = kernels[VARIANTS[name]]
    ring = backend.ring(1)
    most, (steady, _) = most_in_flight(ring.num_slots), ring.in_flight
    backend.in_flight = {UNBOUNDED: (most, most), STEADY: (steady, steady)}.get(name)


def kernel(backend: CudaBackend, told: str) -> Kernel:
    """A variant's code, loaded."""
    return load(backend.plan, variant_cubin(backend.plan, told))


def load(plan: Plan, cubin: Cubin) -> Kernel:
    """A decoder onto the GPU."""
    found = Kernel(cubin, "decode", THREADS, plan.machine.shared_bytes)
    found.require_one_cta_an_sm(plan.machine.num_ctas)
    return found


def drawn(backend: CudaBackend, steps: Steps) -> tuple[Int32, Float32]:
    """Tokens of a run, and the logits of its first."""
    first = steps.first_rows(CASE, np.zeros(1, np.int32))[0]
    logits = steps.decode(np.array([first.token_id], np.int32), CASE.depth, np.zeros(1, np.int32))
    return steps.run(CASE).tokens, np.array(logits.logits[0])


def is_right(
    name: str,
    found: tuple[Int32, Float32],
    expected: tuple[Int32, Float32],
    rounding: float,
) -> bool:
    """The kernel's own tokens and bits; of sums in another order the logits to their rounding."""
    if name == FFMA:
        difference = np.abs(found[1] - expected[1]).max()
        return bool(difference <= rounding * np.std(expected[1]))
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    main()
