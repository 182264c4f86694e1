"""What this computer's processor offers the planner.

/proc, /sys -> `Machine`.
"""

import os
import platform
from functools import cache
from pathlib import Path

from flashformer.errors import UsageError
from flashformer.plan.machine import Machine

PAGE_TOKENS = 32  # two AVX-512 vectors of positions; a small unit for sharing a prompt's beginning
MAX_ROWS = 128  # tokens of a prompt chunk: enough to make its products bound by arithmetic
MAX_THREADS = 256
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} | AVX2


def cpu_machine(threads: int | None = None) -> Machine:
    """Describe this computer, with `threads` threads (default: the physical cores it may use).

    Raises `UsageError` for a number of threads that makes no sense.
    """
    if threads is None:
        threads = usable_cores()
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads are not possible; choose 1 to {MAX_THREADS}")
    return Machine(
        kind="cpu",
        name=platform.machine(),
        arch=detect_arch(),
        num_ctas=threads,
        layout="panel",
        page_tokens=PAGE_TOKENS,
        kv_format="f32",
        max_rows=MAX_ROWS,
        compact=True,
    )


def detect_arch() -> str:
    """Which vector instructions the kernel can use: avx512vnni, avx512, avx2, neon or scalar."""
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    flags = cpu_flags()
    if flags >= AVX512:
        return "avx512vnni" if "avx512_vnni" in flags else "avx512"
    return "avx2" if flags >= AVX2 else "scalar"


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that the operating system reports; empty where it does not."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, less any limit of its cgroup."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cgroup_cpus()))


def _core_of(cpu: int) -> str:
    """A name that the hardware threads of one core share."""
    siblings = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(siblings).strip() or str(cpu)


def _cgroup_cpus() -> int:
    """CPUs' worth of time that the cgroup grants, rounded up."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not period:
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return MAX_THREADS
    return max(1, -(-int(quota) // int(period)))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
