"""What `doctor` tells about the GPUs of a machine.

libcuda, nvidia-smi -> `Finding`s; neither needs the packages of the [cuda] extra
"""

import csv
import ctypes
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from flashformer.serve.findings import Finding

ATTRIBUTES = {  # CUdevice_attribute of cuda.h
    "sms": 16,
    "exec_timeout": 17,
    "major": 75,
    "minor": 76,
    "cooperative": 95,
    "shared_bytes": 97,  # of one CTA, opt-in
    "mps": 133,
}
LEAST_MAJOR = 8
SMI_SECONDS = 20
REINSTALL = "reinstall nvidia-cuda-nvrtc"

Ask = Callable[[str, str], list[list[str]]]  # kind of query, fields -> rows


def gpu_findings(driver: ctypes.CDLL, count: int, ask: Ask | None = None) -> Iterator[Finding]:
    """Every GPU's hardware, memory and neighbours, and whether the kernel can run there."""
    ask = ask or nvidia_smi
    memory = ask("gpu", "memory.total,memory.free,mig.mode.current,compute_mode")
    for number in range(count):
        row = memory[number] if number < len(memory) else []
        yield hardware(driver, number)
        if row:
            yield room(number, row)
        yield from sharing(driver, number, row)
    neighbours = ask("compute-apps", "pid,process_name,used_memory")
    if neighbours:
        names = ", ".join(f"{name} (pid {pid}, {used} MiB)" for pid, name, used in neighbours)
        cure = "speeds will vary, and what they hold is not free"
        yield Finding("gpu", "warn", f"in use by {names}", cure)


def hardware(driver: ctypes.CDLL, number: int) -> Finding:
    """Name, architecture, SMs and shared memory of a GPU."""
    found = attributes(driver, number)
    arch = f"{found['major']}.{found['minor']}"
    detail = (
        f"{gpu_name(driver, number)}: compute capability {arch}, {found['sms']} SMs, "
        f"{found['shared_bytes'] >> 10} KB of shared memory a CTA"
    )
    if found["major"] < LEAST_MAJOR:
        return Finding("gpu", "warn", detail, "the CUDA kernel needs 8.0; use --device cpu")
    if not found["cooperative"]:
        cure = "use --device cpu, or a driver in compute mode"
        return Finding("gpu", "warn", f"{detail}, no cooperative launch", cure)
    return Finding("gpu", "ok", f"{detail}, cooperative launch")


def room(number: int, row: list[str]) -> Finding:
    """Free memory of a GPU, from nvidia-smi's MiB."""
    total, free = row[0], row[1]
    detail = f"GPU {number}: {free} of {total} MiB free"
    if total.isdigit() and free.isdigit() and 2 * int(free) < int(total):
        return Finding("gpu memory", "warn", detail, "another program holds the rest")
    return Finding("gpu memory", "ok", detail)


def sharing(driver: ctypes.CDLL, number: int, row: list[str]) -> Iterator[Finding]:
    """MIG, MPS, a display's time limit, a compute mode that lets nobody in."""
    found = attributes(driver, number)
    if row[2:3] == ["Enabled"]:
        yield Finding("gpu", "ok", f"GPU {number} is cut into MIG slices; the plan fits this one")
    if found["mps"] > 0:
        cure = "CTAs of other clients share its SMs: expect slower and less even tokens"
        yield Finding("gpu", "warn", f"GPU {number} runs under MPS", cure)
    if found["exec_timeout"]:
        cure = "the driver stops launches of seconds; generate fewer tokens a launch"
        yield Finding("gpu", "warn", f"GPU {number} also drives a display", cure)
    if row[3:4] == ["Prohibited"]:
        cure = "nvidia-smi -c 0 (as root) lets programs use it"
        yield Finding("gpu", "warn", f"GPU {number} is in compute mode Prohibited", cure)


def attributes(driver: ctypes.CDLL, number: int) -> dict[str, int]:
    """The driver's numbers; 0 where it knows none."""
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), number):
        return dict.fromkeys(ATTRIBUTES, 0)
    found = {}
    for name, attribute in ATTRIBUTES.items():
        failed = driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found[name] = 0 if failed else value.value
    return found


def gpu_name(driver: ctypes.CDLL, number: int) -> str:
    """What the driver calls the GPU."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), number):
        return f"GPU {number}"
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")


def compiler_version() -> Finding:
    """NVRTC, which compiles the kernel."""
    try:
        from cuda.bindings import nvrtc

        status, *version = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        return Finding(
            "nvrtc", "warn", f"cannot be loaded ({error})", "reinstall nvidia-cuda-nvrtc"
        )
    number = ".".join(str(part) for part in version)
    if int(status):
        return Finding("nvrtc", "warn", "does not answer", REINSTALL)
    if int(version[0]) < 13:
        return Finding("nvrtc", "warn", f"version {number}", "pip install 'nvidia-cuda-nvrtc>=13'")
    return Finding("nvrtc", "ok", f"version {number} compiles the kernel")


def nvidia_smi(kind: str, fields: str) -> list[list[str]]:
    """Rows of `nvidia-smi --query-KIND`; none if there is no such program or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-{kind}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return rows_of(done.stdout, len(fields.split(","))) if done.returncode == 0 else []


def rows_of(text: str, num_fields: int) -> list[list[str]]:
    """The rows of nvidia-smi's answer that have all fields."""
    rows: list[Any] = list(csv.reader(io.StringIO(text), skipinitialspace=True))
    return [[str(cell).strip() for cell in row] for row in rows if len(row) == num_fields]
