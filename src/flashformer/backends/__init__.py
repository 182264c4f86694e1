"""One plan, three ways to run it.

`open_backend` is the only place that knows all of them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from flashformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flashformer.backends.base import Backend, Fit, Timed
    from flashformer.model.spec import ModelSpec
    from flashformer.model.weights import WeightSource
    from flashformer.plan.machine import Machine
    from flashformer.plan.pack import Progress
    from flashformer.plan.plan import PlanOptions

DEVICES = ("auto", "cpu", "cuda", "reference")
CUDA_PACKAGES = ("torch", "cuda.bindings")


def open_backend(
    device: str,
    spec: ModelSpec,
    weights: WeightSource,
    options: PlanOptions,
    *,
    num_pages: int,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Backend:
    """Plan, pack or read the image, compile, and open the backend of `device`.

    `device` is cpu, cuda, reference, or auto: cuda where it can run, else cpu. `threads` is for the
    CPU (default: its physical cores); `progress` is called as (what, done, total). Raises
    `UsageError` for an unknown or impossible device, and what planning, packing, compiling raise.
    """
    if _is_cuda(device):
        return _open_cuda(spec, weights, options, num_pages, progress)
    from flashformer.codegen.cache import load_image
    from flashformer.plan.plan import make_plan

    if device == "reference":
        from flashformer.backends.reference import ReferenceBackend, reference_machine

        plan = make_plan(spec, reference_machine(), options)
        return ReferenceBackend(plan, load_image(plan, weights, progress=progress), num_pages)
    from flashformer.backends.cpu.backend import open_cpu

    return open_cpu(spec, weights, options, num_pages, threads, progress)


def open_profiled(
    device: str,
    spec: ModelSpec,
    weights: WeightSource,
    options: PlanOptions,
    *,
    num_pages: int,
    trace_moments: int,
    progress: Progress | None = None,
) -> Timed:
    """The backend of `device` with a timeline of so many moments compiled in; cuda alone has one.

    Raises `UsageError` for another device, and what `open_backend` raises.
    """
    if not _is_cuda(device):
        raise UsageError(
            f"a timeline is recorded by the CUDA kernel alone, and device {device} is not a GPU; "
            "use `flashformer bench` for the speed of a CPU"
        )
    from flashformer.codegen.instruments import Instruments

    backend: Timed = _cuda("open_cuda")(
        spec,
        weights,
        options,
        num_pages=num_pages,
        progress=progress,
        instruments=Instruments(trace_moments=trace_moments),
    )
    return backend


def gpu_fit(spec: ModelSpec, weight_format: str, batch: int) -> Fit:
    """What of a model fits the free memory of the GPU. Raises `UsageError` without a GPU."""
    found: Fit = _cuda("fit")(spec, weight_format, batch)
    return found


def gpu_bandwidth() -> float:
    """GB/s of the decoder's ring over 2.5 GB of memory. Raises `UsageError` without a GPU."""
    found: float = _cuda("measure_bandwidth")()
    return found


def machine_of(device: str, spec: ModelSpec, threads: int | None = None) -> Machine:
    """The machine that `open_backend` would plan `spec` for; opens and allocates nothing.

    Raises `UsageError` for an unknown or impossible device.
    """
    if _is_cuda(device):
        machine: Machine = _cuda("cuda_machine")(spec)
        return machine
    if device == "reference":
        from flashformer.backends.reference import reference_machine

        return reference_machine()
    from flashformer.backends.cpu.machine import cpu_machine

    return cpu_machine(threads)


def _is_cuda(device: str) -> bool:
    """Whether `device` means the GPU; `UsageError` if it means nothing."""
    if device not in DEVICES:
        raise UsageError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
    return device == "cuda" or (device == "auto" and _has_gpu())


def _has_gpu() -> bool:
    """Whether the CUDA backend's packages are installed and see a GPU.

    The driver is asked first: importing torch takes seconds.
    """
    try:
        if ctypes.CDLL("libcuda.so.1").cuInit(0):
            return False
    except OSError:
        return False
    try:
        if any(importlib.util.find_spec(name) is None for name in CUDA_PACKAGES):
            return False
        import torch

        return bool(torch.cuda.is_available())
    except (ImportError, ValueError):
        return False


def _open_cuda(
    spec: ModelSpec,
    weights: WeightSource,
    options: PlanOptions,
    num_pages: int,
    progress: Progress | None,
) -> Backend:
    backend: Backend = _cuda("open_cuda")(
        spec, weights, options, num_pages=num_pages, progress=progress
    )
    return backend


def _cuda(function: str) -> Callable[..., Any]:
    """A function of the CUDA backend, or the `UsageError` that says what it lacks."""
    try:
        found: Callable[..., Any] = getattr(
            importlib.import_module("flashformer.backends.cuda"), function
        )
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"device cuda needs packages that are not installed ({error}); "
            "install flashformer[cuda] or use --device cpu"
        ) from error
    if not _has_gpu():
        raise UsageError("device cuda needs an NVIDIA GPU and none was found; use --device cpu")
    return found
