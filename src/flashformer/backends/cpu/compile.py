"""The CPU kernel's binary: plan -> shared library, built by the system's compiler, cached.

The library is found again by the text of config.h, of the kernel's sources, the compiler's version
and the processor's instruction sets.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flashformer.backends.cpu.machine import cpu_flags
from flashformer.codegen.cache import compiled, is_compiled
from flashformer.codegen.header import render
from flashformer.errors import CompileError
from flashformer.plan.plan import Plan

KERNEL = Path(__file__).parent / "kernel"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Exported tables are one per process under g++: a second model would read those of the first.
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a multiply-add is fused where the source says so, or bits would differ
)
TARGET_FLAGS = {"neon": ("-mcpu=native",), "scalar": ("-DFLASHFORMER_SCALAR",)}
NATIVE = ("-march=native",)
LIBRARY = "kernel.so"
TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler of this computer."""

    path: str
    version: str  # first line of --version


def compile_kernel(plan: Plan) -> Path:
    """The shared library of `plan`, from the cache or built now. Raises `CompileError`."""
    compiler = find_compiler()

    def build(folder: Path) -> None:
        build_library(compiler, render(plan), _flags(plan), folder)

    return compiled(f"cpu-{plan.machine.arch}", _key(plan, compiler), build) / LIBRARY


def kernel_is_ready(plan: Plan) -> bool:
    """Whether `compile_kernel` would find the library built. Raises `CompileError`."""
    return is_compiled(f"cpu-{plan.machine.arch}", _key(plan, find_compiler()))


def _flags(plan: Plan) -> tuple[str, ...]:
    return (*FLAGS, *TARGET_FLAGS.get(plan.machine.arch, NATIVE))


def _key(plan: Plan, compiler: Compiler) -> list[str]:
    """Everything that the library's bytes depend on."""
    key = [compiler.version, " ".join(_flags(plan)), " ".join(sorted(cpu_flags())), render(plan)]
    return key + [t for path in sorted(KERNEL.iterdir()) for t in (path.name, path.read_text())]


def build_library(
    compiler: Compiler, header: str, flags: Sequence[str], folder: Path, output: str = LIBRARY
) -> None:
    """Write config.h into `folder` and compile the kernel with it. Raises `CompileError`."""
    (folder / "config.h").write_text(header)
    sources = [f"-I{folder}", str(KERNEL / "decode.cpp"), "-o", str(folder / output)]
    command = [compiler.path, *flags, *sources]
    (folder / "command.txt").write_text(" ".join(command) + "\n")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"The compiler {compiler.path} did not run: {error}.") from error
    if done.returncode != 0:
        reason = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr[-500:])
        raise CompileError(
            f"{compiler.path} ({compiler.version}) refused the CPU kernel: {reason.strip()}; "
            "g++ 11 or clang++ 14 and later are expected: set FLASHFORMER_CXX to one of them."
        )


def find_compiler() -> Compiler:
    """The C++ compiler: FLASHFORMER_CXX, CXX, then g++, clang++, c++. Raises `CompileError`."""
    for variable in ("FLASHFORMER_CXX", "CXX"):
        named = os.environ.get(variable)
        if named:
            path = shutil.which(named)
            if path is None:
                raise CompileError(
                    f"{variable} names the C++ compiler {named!r}, which is not an executable; "
                    "correct it or unset it."
                )
            return _compiler(path)
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return _compiler(path)
    raise CompileError(
        "There is no C++ compiler (looked for g++, clang++ and c++), and one builds the CPU kernel "
        "at first use; install it (Debian, Ubuntu: apt install g++) or set FLASHFORMER_CXX."
    )


@cache
def _compiler(path: str) -> Compiler:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(
            f"The C++ compiler {path} does not run ({error}); set FLASHFORMER_CXX to one that does."
        ) from error
    return Compiler(path, done.stdout.splitlines()[0] if done.stdout else "unknown version")
