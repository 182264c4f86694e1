"""kernel/ + config.h -> cubin, through NVRTC: needs no CUDA toolkit and, to compile, no GPU."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashformer.backends.cuda.program import build_program
from flashformer.backends.cuda.validate import check_program
from flashformer.codegen.cache import compiled
from flashformer.codegen.cuda_header import render_cuda
from flashformer.codegen.instruments import NONE, Instruments
from flashformer.errors import CompileError
from flashformer.plan.plan import Plan

HERE = Path(__file__).parent
KERNEL = HERE / "kernel"
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
) -> Cubin:
    """kernel/`name`.cu compiled for `plan.machine.arch`, from the cache or now.

    The decoder is compiled only for a plan whose program is proven to end (`validate`); with the
    kernel, the proof is in the cache. Raises `PlanError`, or `CompileError` with NVRTC's log.
    """
    from cuda.bindings import nvrtc

    header = render_cuda(plan, instruments, rows)
    status, *version = nvrtc.nvrtcVersion()
    _check(status)
    key = [f"nvrtc {version}", plan.machine.arch, name, header]
    sources = [*sorted(KERNEL.iterdir()), *(HERE / name for name in PROOF)]
    key += [text for path in sources for text in (path.name, path.read_text())]

    def build(folder: Path) -> None:
        if name == "decode":
            check_program(build_program(plan))
        watched = instruments.every_lane_arrives
        cubin = build_cubin(header, name, plan.machine.arch, lines=watched)
        (folder / "config.h").write_text(header)
        (folder / "resources.json").write_text(json.dumps(asdict(cubin.resources)))
        (folder / "kernel.cubin").write_bytes(cubin.code)

    folder = compiled(f"cuda-{name}-{plan.machine.arch}", key, build)
    resources = Resources(**json.loads((folder / "resources.json").read_text()))
    return Cubin((folder / "kernel.cubin").read_bytes(), resources)


def build_cubin(
    header: str, name: str, arch: str, folder: Path | None = None, *, lines: bool = False
) -> Cubin:
    """Compile `name`.cu with `header` as config.h and all of kernel/ beside it.

    `folder`: where it lies (default: kernel/). `lines`: sanitizers can name lines of the source.
    Raises `CompileError`.
    """
    from cuda.bindings import nvrtc

    headers = {path.name: path.read_bytes() for path in sorted(KERNEL.glob("*.cu*"))}
    headers["config.h"] = header.encode()
    source = ((folder or KERNEL) / f"{name}.cu").read_bytes()
    names = [n.encode() for n in headers]
    status, program = nvrtc.nvrtcCreateProgram(
        source, f"{name}.cu".encode(), len(headers), list(headers.values()), names
    )
    _check(status)
    options = [f"--gpu-architecture={arch}", "--std=c++20", "--ptxas-options=-v"]
    options += ["--generate-line-info"] * lines
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    text = log.rstrip(b"\0").decode(errors="replace").strip()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(
            f"NVRTC refused the CUDA kernel for {arch}; version 13 of nvidia-cuda-nvrtc or later "
            f"is expected: {text}"
        )
    code = _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    nvrtc.nvrtcDestroyProgram(program)
    return Cubin(code, _resources(text))


def _resources(log: str) -> Resources:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    return Resources(max(registers, default=0), sum(spills), max(shared, default=0))


def _read(program: Any, size_of: Any, read: Any) -> bytes:
    status, size = size_of(program)
    _check(status)
    buffer = bytes(int(size))
    (status,) = read(program, buffer)
    _check(status)
    return bytes(buffer)


def _check(status: Any) -> None:
    if int(status) != 0:
        raise CompileError(f"NVRTC failed ({status.name}); reinstall nvidia-cuda-nvrtc")
