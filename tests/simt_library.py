"""Parts of the CUDA kernel built by the C++ compiler, with the fibers of tests/simt for threads."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from flashformer.backends.cpu.compile import find_compiler
from flashformer.backends.cuda.compile import KERNEL
from flashformer.codegen.cuda_header import render_cuda

SIMT = Path(__file__).parent / "simt"


def simt_library(folder, plan, name):
    """The library of tests/simt/NAME.cpp for `plan`, built in `folder`."""
    for path in KERNEL.glob("*.cuh"):
        shutil.copy(path, folder)
    for path in SIMT.iterdir():
        shutil.copy(path, folder)  # in place of the kernel's own ptx.cuh and ring.cuh
    (folder / "config.h").write_text(render_cuda(plan))
    library = folder / f"{name}.so"
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{folder}"]
    source = str(folder / f"{name}.cpp")
    subprocess.run([find_compiler().path, *options, source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
