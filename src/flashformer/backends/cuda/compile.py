"""kernel/ + config.h -> cubin, through NVRTC: needs no CUDA toolkit and, to compile, no GPU."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from flashformer.backends.cuda import nvrtc
from flashformer.backends.cuda.machine import row_classes
from flashformer.backends.cuda.program import build_program
from flashformer.backends.cuda.validate import check_program
from flashformer.codegen.cache import compiled
from flashformer.codegen.cuda_header import render_cuda
from flashformer.codegen.instruments import NONE, Instruments
from flashformer.errors import CompileError, FlashFormerError
from flashformer.plan.plan import Plan

HERE = Path(__file__).parent
KERNEL = HERE / "kernel"
T = TypeVar("T")
PROOF = ("clocks.py", "geometry.py", "program.py", "validate.py")


@dataclass(frozen=True, slots=True)
class Resources:
    """What the assembler said about a kernel."""

    registers: int  # of a thread
    spill_bytes: int  # stores and loads of registers that did not fit
    shared_bytes: int  # of fixed size, of a CTA


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel."""

    code: bytes
    resources: Resources


def compile_kernel(
    plan: Plan,
    name: str = "decode",
    instruments: Instruments = NONE,
    rows: int | None = None,
    *,
    apart: bool = False,
) -> Cubin:
    """kernel/`name`.cu compiled for `plan.machine.arch`, from the cache or now.

    `apart`: in a process of its own, so that threads can compile side by side.

    The decoder is compiled only for a plan whose program is proven to end (`validate`); with the
    kernel, the proof is in the cache. Raises `PlanError`, or `CompileError` with NVRTC's log.
    """
    header = render_cuda(plan, instruments, rows)
    key = [_run(nvrtc.version), plan.machine.arch, name, header]
    sources = [*sorted(KERNEL.iterdir()), *(HERE / name for name in PROOF)]
    key += [text for path in sources for text in (path.name, path.read_text("utf-8"))]

    def build(folder: Path) -> None:
        if name == "decode":
            check_program(build_program(plan))
        watched = instruments.every_lane_arrives
        cubin = build_cubin(header, name, plan.machine.arch, lines=watched, apart=apart)
        (folder / "config.h").write_text(header)
        (folder / "resources.json").write_text(json.dumps(asdict(cubin.resources)))
        (folder / "kernel.cubin").write_bytes(cubin.code)

    folder = compiled(f"cuda-{name}-{plan.machine.arch}", key, build)
    resources = Resources(**json.loads((folder / "resources.json").read_text("utf-8")))
    return Cubin((folder / "kernel.cubin").read_bytes(), resources)


def compile_ahead(plan: Plan, instruments: Instruments = NONE) -> None:
    """Start compiling all kernels of a backend for the cache, side by side; does not wait.

    Whoever asks `compile_kernel` for one meanwhile waits for it there, and hears what is wrong.
    """

    def build(name: str, rows: int | None) -> None:
        with suppress(FlashFormerError):
            compile_kernel(plan, name, instruments if rows else NONE, rows, apart=True)

    for rows in row_classes(plan.machine):
        Thread(target=build, args=("decode", rows), daemon=True).start()
    Thread(target=build, args=("prefill", None), daemon=True).start()


def build_cubin(
    header: str,
    name: str,
    arch: str,
    folder: Path | None = None,
    *,
    lines: bool = False,
    apart: bool = False,
) -> Cubin:
    """Compile `name`.cu with `header` as config.h and all of kernel/ beside it.

    `folder`: where it lies (default: kernel/); whatever else lies there goes before what kernel/
    has of that name. `lines`: sanitizers can name lines of the source.
    `apart`: in a process of its own, see `nvrtc`. Raises `CompileError`.
    """
    paths = [*sorted(KERNEL.glob("*.cu*")), *sorted((folder or KERNEL).glob("*.cu*"))]
    headers = {path.name: path.read_text("utf-8") for path in paths}
    headers["config.h"] = header
    source = ((folder or KERNEL) / f"{name}.cu").read_text("utf-8")
    options = [f"--gpu-architecture={arch}", "--std=c++20", "--ptxas-options=-v"]
    options += ["--generate-line-info"] * lines
    compile_it = nvrtc.compile_apart if apart else nvrtc.compile_here
    status, log, code = _run(compile_it, source, f"{name}.cu", headers, options)
    if status != nvrtc.SUCCESS:
        raise CompileError(
            f"NVRTC refused the CUDA kernel for {arch}; version 13 of nvidia-cuda-nvrtc or later "
            f"is expected: {log}"
        )
    return Cubin(code, _resources(log))


def _run(call: Callable[..., T], *arguments: Any) -> T:
    try:
        return call(*arguments)
    except (ImportError, RuntimeError) as error:
        raise CompileError(f"NVRTC failed ({error}); reinstall nvidia-cuda-nvrtc") from error


def _resources(log: str) -> Resources:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    return Resources(max(registers, default=0), sum(spills), max(shared, default=0))
