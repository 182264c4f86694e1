"""The kernels of prefill.cu on a CPU, compiled by g++ against a stand-in for CUDA.

A thread for a thread: `emulated_ops(plan, folder)` -> `KernelOps` for host memory.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

from flashformer.backends.cuda.compile import KERNEL
from flashformer.backends.cuda.prefill_kernels import KernelOps
from flashformer.codegen.cuda_header import render_cuda

EMULATION = Path(__file__).parent / "emulation"


def emulated_ops(plan, folder):
    """Compile for `plan` into `folder`; the same launches as on a GPU, from the same class."""
    past = (KERNEL / "past.cuh").read_text()
    offsets = past[past.index("__device__ __forceinline__ u32 key_offset") :]
    (folder / "offsets.inc").write_text(offsets[: offsets.index("// What a row sees")])
    (folder / "config.h").write_text(render_cuda(plan))
    for path in (KERNEL / "prefill.cu", *EMULATION.iterdir()):
        shutil.copy(path, folder)
    library = folder / "emulated.so"
    compiler = [
        shutil.which("g++") or "clang++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
        "-w",
    ]
    command = [*compiler, f"-I{folder}", folder / "emulate.cpp", "-o", library]
    subprocess.run(command, check=True)
    ops = KernelOps.__new__(KernelOps)
    ops._functions = EmulatedFunctions(ctypes.CDLL(str(library)))
    ops._stream = 0
    return ops


class EmulatedFunctions:
    """Stands in for `launch.Functions`."""

    def __init__(self, library):
        self._library = library

    def launch(self, name, num_ctas, stream, *values):
        storage = [ctypes.c_uint64(value) for value in values]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, storage))
        getattr(self._library, f"emulate_{name}")(num_ctas, pointers)
