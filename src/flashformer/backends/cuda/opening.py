"""From a description and weights to a backend on the first GPU, and what would fit it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from cuda.bindings import driver

from flashformer.backends.base import Fit
from flashformer.backends.cuda.backend import CudaBackend
from flashformer.backends.cuda.compile import compile_ahead
from flashformer.backends.cuda.launch import check
from flashformer.backends.cuda.machine import cuda_machine
from flashformer.backends.cuda.memory import (
    fitting_context,
    past_bytes_per_token,
    require_gpu_memory,
)
from flashformer.backends.cuda.random_image import random_image
from flashformer.codegen.cache import load_image
from flashformer.codegen.instruments import NONE, Instruments
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import AnyWeights, WeightSource
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import head_format


def open_cuda(
    spec: ModelSpec,
    weights: WeightSource,
    options: PlanOptions,
    *,
    num_pages: int,
    progress: Callable[[str, int, int], None] | None = None,
    instruments: Instruments = NONE,
) -> "CudaBackend":
    """Plan for the first GPU, pack or read the image, compile, and move in.

    `AnyWeights` are made on the GPU.

    float32 weights are stored as bf16: the tensor cores multiply 16 bits. Raises
    `OutOfMemoryError` before anything is allocated, and what planning and compiling raise.
    """
    options = replace(
        options,
        format=_sixteen_bits(options.format),
        head_format=_sixteen_bits(options.head_format),
    )
    plan = make_plan(spec, cuda_machine(spec), options)
    check(driver.cuInit(0))
    require_gpu_memory(plan, num_pages, torch.cuda.mem_get_info(0)[0])
    compile_ahead(plan, instruments)  # while the image is packed or read
    image = (
        random_image(plan, torch.device("cuda"))
        if isinstance(weights, AnyWeights)
        else load_image(plan, weights, progress=progress)
    )
    backend = CudaBackend(plan, image, num_pages, instruments, progress)
    backend.warm_up()
    return backend


def fit(spec: ModelSpec, weight_format: str, batch: int) -> Fit:
    """What of a model fits the memory that the first GPU has free."""
    name = _sixteen_bits(weight_format)
    plan = make_plan(
        spec, cuda_machine(spec), PlanOptions(name, head_format(name, "cuda"), 1, batch)
    )
    free = torch.cuda.mem_get_info(0)[0]
    past = past_bytes_per_token(plan)
    return Fit(name, plan.image_bytes, past, free, fitting_context(plan, free))


def measure_bandwidth() -> float:
    """`CudaBackend.read_bandwidth` over memory that holds no model."""
    spec = ModelSpec.from_hf(SHAPES["llama-3.2-1b"])
    plan = make_plan(spec, cuda_machine(spec), PlanOptions(context=64, max_batch=1))
    require_gpu_memory(plan, 1, torch.cuda.mem_get_info(0)[0])
    image = torch.zeros(plan.image_bytes, dtype=torch.uint8, device="cuda")
    backend = CudaBackend(plan, image, num_pages=1)
    found = backend.read_bandwidth()
    backend.close()
    return found


def _sixteen_bits(name: str) -> str:
    return "bf16" if name == "f32" else name
