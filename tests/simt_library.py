"""Parts of the CUDA kernel built by the C++ compiler, with the fibers of tests/simt for threads."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from flashformer.backends.cpu.compile import find_compiler
from flashformer.backends.cuda.compile import KERNEL
from flashformer.codegen.cuda_header import render_cuda

SIMT = Path(__file__).parent / "simt"


def simt_library(folder, plan, name, rows=None):
    """The library of tests/simt/NAME.cpp for `plan`, of the row class `rows`, built in `folder`."""
    for path in (*KERNEL.glob("*.cuh"), KERNEL / "decode.cu"):
        shutil.copy(path, folder)
    for path in SIMT.iterdir():
        shutil.copy(path, folder)  # in place of the kernel's own ptx.cuh
    (folder / "config.h").write_text(render_cuda(plan, rows=rows))
    library = folder / f"{name}.so"
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{folder}"]
    options.append("-U_FORTIFY_SOURCE")  # whose longjmp stays on one stack
    source = str(folder / f"{name}.cpp")
    subprocess.run([find_compiler().path, *options, source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
