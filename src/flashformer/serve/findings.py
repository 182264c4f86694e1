"""The facts that `doctor` looks up, one function a subject.

-> `Finding`s
"""

import ctypes
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flashformer.backends import CUDA_PACKAGES
from flashformer.backends.cpu.compile import find_compiler
from flashformer.backends.cpu.machine import detect_arch, usable_cores
from flashformer.codegen.cache import cache_dir, entries
from flashformer.engine.memory import available_memory
from flashformer.errors import FlashFormerError
from flashformer.serve.benchmark.provenance import cpu_name
from flashformer.serve.cache import size_text

LITTLE_MEMORY = 4 * 2**30
MANY_BYTES = 50 * 2**30  # a cache of this size deserves a word
LITTLE_ROOM = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the machine."""

    subject: str
    level: str  # ok; warn: works, but slower or not everything; fail: the CPU path cannot run
    detail: str
    cure: str = ""

    def to_json(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)


def all_findings() -> list[Finding]:
    """Everything that `doctor` prints, in its order."""
    return [
        python_version(),
        compiler(),
        processor(),
        threads(),
        memory(),
        huge_pages(),
        cache(),
        *graphics(),
    ]


def python_version() -> Finding:
    """Python itself; an older one could not have imported this file."""
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def compiler() -> Finding:
    """The C++ compiler that builds the CPU kernel."""
    try:
        found = find_compiler()
    except FlashFormerError as error:
        return Finding("compiler", "fail", str(error))
    return Finding("compiler", "ok", f"{found.path} ({found.version})")


def processor() -> Finding:
    """The processor and the instruction set that the kernel would use."""
    arch = detect_arch()
    if arch == "scalar":
        return Finding(
            "processor",
            "warn",
            f"{cpu_name()}: no vector instructions that FlashFormer uses",
            "expect a slow kernel; AVX2, AVX-512 and NEON are fast",
        )
    return Finding("processor", "ok", f"{cpu_name()}: {arch} kernels")


def threads() -> Finding:
    """Cores that this process may use."""
    used, all_cores = usable_cores(), os.cpu_count() or 1
    load = os.getloadavg()[0]
    detail = f"{used} threads on {all_cores} logical cores, load {load:.1f}"
    if load > used:
        return Finding("threads", "warn", detail, "other programs are busy; speeds will vary")
    return Finding("threads", "ok", detail)


def memory() -> Finding:
    """Memory that is free for a model."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = available_memory()
    if free is None:
        return Finding("memory", "ok", f"{size_text(total)}")
    detail = f"{size_text(free)} of {size_text(total)} available"
    if free < LITTLE_MEMORY:
        return Finding("memory", "warn", detail, "use a small model or --quant int4")
    return Finding("memory", "ok", detail)


def huge_pages() -> Finding:
    """Whether the kernel may back the image with large pages."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        return Finding("huge pages", "warn", "unknown on this system")
    choice = path.read_text().split("[", 1)[-1].split("]", 1)[0]
    if choice == "never":
        cure = f"write madvise to {path} for up to a tenth more bandwidth"
        return Finding("huge pages", "warn", "switched off", cure)
    return Finding("huge pages", "ok", choice)


def cache() -> Finding:
    """Where images and kernels are kept."""
    folder = cache_dir()
    cure = "set FLASHFORMER_CACHE_DIR to a folder that you may write to"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        return Finding("cache", "warn", f"{folder}: {error.strerror}", cure)
    if not writable:
        return Finding("cache", "warn", f"{folder} is read-only", cure)
    used, free = sum(entry.nbytes for entry in entries()), shutil.disk_usage(folder).free
    detail = f"{folder}: {size_text(used)} used, {size_text(free)} free on the disk"
    if free < LITTLE_ROOM or used > MANY_BYTES:
        return Finding("cache", "warn", detail, "`flashformer cache clear` makes room")
    return Finding("cache", "ok", detail)


def graphics() -> Iterator[Finding]:
    """NVIDIA driver, GPUs and the run-time compiler, where a driver is."""
    from flashformer.serve.gpu_findings import compiler_version, gpu_findings

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        yield Finding("gpu", "ok", "no NVIDIA driver; the CPU path needs none")
        return
    version, count = ctypes.c_int(), ctypes.c_int()
    failed = driver.cuInit(0)
    if failed or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        detail = f"an NVIDIA driver without a usable GPU (CUDA error {failed})"
        yield Finding("gpu", "warn", detail, "see whether nvidia-smi lists one")
        return
    driver.cuDriverGetVersion(ctypes.byref(version))
    supported = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    yield Finding("driver", "ok", f"supports {supported}, {count.value} GPU(s)")
    yield from gpu_findings(driver)
    packages = cuda_packages()
    yield packages
    if packages.level == "ok":
        yield compiler_version()


def cuda_packages() -> Finding:
    """The packages that the CUDA backend needs, from the `[cuda]` extra."""
    missing = [name for name in CUDA_PACKAGES if not _is_installed(name)]
    if not missing:
        return Finding("cuda", "ok", "the packages of the [cuda] extra are installed")
    detail = f"not installed: {', '.join(missing)}"
    return Finding("cuda", "warn", detail, "pip install 'flashformer[cuda]'")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
