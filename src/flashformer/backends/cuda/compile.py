"""kernel/ + config.h -> cubin, through NVRTC: needs no CUDA toolkit and, to compile, no GPU."""

import re
from dataclasses import dataclass
from pathlib import Path

from flashformer.codegen.cuda_header import render_cuda
from flashformer.errors import CompileError
from flashformer.plan.plan import Plan

KERNEL_DIR = Path(__file__).parent / "kernel"


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel and what the assembler said about it."""

    code: bytes
    registers: int
    spill_bytes: int  # stores and loads of registers that did not fit
    log: str


def compile_kernel(plan: Plan, name: str = "decode", trace_moments: int = 0) -> Cubin:
    """Compile kernel/`name`.cu for `plan.machine.arch`; raises `CompileError` with NVRTC's log."""
    from cuda.bindings import nvrtc

    headers = {path.name: path.read_bytes() for path in sorted(KERNEL_DIR.glob("*.cuh"))}
    headers["config.h"] = render_cuda(plan, trace_moments).encode()
    source = (KERNEL_DIR / f"{name}.cu").read_bytes()
    status, program = nvrtc.nvrtcCreateProgram(
        source,
        f"{name}.cu".encode(),
        len(headers),
        list(headers.values()),
        [n.encode() for n in headers],
    )
    _check(status)
    options = [f"--gpu-architecture={plan.machine.arch}", "--std=c++20", "--ptxas-options=-v"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(
        errors="replace"
    )
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC refused the kernel for {plan.machine.arch}: {log.strip()}")
    code = _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    nvrtc.nvrtcDestroyProgram(program)
    return Cubin(code, *_resources(log), log)


def _resources(log: str) -> tuple[int, int]:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    return max(registers, default=0), sum(spills)


def _read(program: object, size_of: object, read: object) -> bytes:
    status, size = size_of(program)  # type: ignore[operator]
    _check(status)
    buffer = b"\0" * size
    (status,) = read(program, buffer)  # type: ignore[operator]
    _check(status)
    return buffer


def _check(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise CompileError(f"NVRTC failed: {status}; reinstall nvidia-cuda-nvrtc")
