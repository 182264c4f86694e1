"""What `doctor` tells about the GPU of a machine.

libcuda, nvidia-smi -> `Finding`s; neither needs the packages of the [cuda] extra
"""

import csv
import ctypes
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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


def gpu_findings(driver: ctypes.CDLL, ask: Ask | None = None) -> Iterator[Finding]:
    """The GPU that FlashFormer uses, CUDA's first: hardware, memory, neighbours; then the others.

    nvidia-smi numbers all cards, whatever CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER say, so the
    two are brought together by the card's place on the bus.
    """
    ask = ask or nvidia_smi
    cards = [Card(*row) for row in ask("gpu", Card.FIELDS)]
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    here = bus_id(driver, device)
    card = next((card for card in cards if card.is_at(here)), None)
    found = attributes(driver, device)
    yield hardware(found, gpu_name(driver, device))
    if card is not None:
        yield room(card)
    yield from sharing(found, card)
    apps = ask("compute-apps", "gpu_bus_id,pid,process_name,used_memory")
    neighbours = [app for at, *app in apps if card is not None and card.is_at(at)]
    if neighbours:
        names = ", ".join(f"{name} (pid {pid}, {used} MiB)" for pid, name, used in neighbours)
        cure = "speeds will vary, and what they hold is not free"
        yield Finding("gpu", "warn", f"in use by {names}", cure)
    if card is not None and len(cards) > 1:
        yield others([other for other in cards if other != card])


@dataclass(frozen=True, slots=True)
class Card:
    """A row of nvidia-smi's answer; memory in MiB."""

    FIELDS: ClassVar = (
        "pci.bus_id,index,name,memory.total,memory.free,mig.mode.current,compute_mode"
    )
    bus_id: str
    index: str
    name: str
    total: str
    free: str
    mig: str
    compute_mode: str

    def is_at(self, bus_id: str) -> bool:
        """Whether this is the card's place; CUDA writes fewer zeros before it than nvidia-smi."""
        return self.bus_id.lstrip("0").lower() == bus_id.lstrip("0").lower()


def hardware(found: dict[str, int], name: str) -> Finding:
    """Name, architecture, SMs and shared memory of the GPU."""
    arch = f"{found['major']}.{found['minor']}"
    detail = (
        f"{name}: compute capability {arch}, {found['sms']} SMs, "
        f"{found['shared_bytes'] >> 10} KB of shared memory a CTA"
    )
    if found["major"] < LEAST_MAJOR:
        return Finding("gpu", "warn", detail, "the CUDA kernel needs 8.0; use --device cpu")
    if not found["cooperative"]:
        cure = "use --device cpu, or a driver in compute mode"
        return Finding("gpu", "warn", f"{detail}, no cooperative launch", cure)
    return Finding("gpu", "ok", f"{detail}, cooperative launch")


def room(card: Card) -> Finding:
    """Free memory of the GPU."""
    total, free = card.total, card.free
    detail = f"{free} of {total} MiB free"
    if total.isdigit() and free.isdigit() and 2 * int(free) < int(total):
        return Finding("gpu memory", "warn", detail, "another program holds the rest")
    return Finding("gpu memory", "ok", detail)


def sharing(found: dict[str, int], card: Card | None) -> Iterator[Finding]:
    """MIG, MPS, a display's time limit, a compute mode that lets nobody in."""
    if card is not None and card.mig == "Enabled":
        yield Finding("gpu", "ok", "cut into MIG slices; the plan fits this one")
    if found["mps"] > 0:
        cure = "CTAs of other clients share its SMs: expect slower and less even tokens"
        yield Finding("gpu", "warn", "runs under MPS", cure)
    if found["exec_timeout"]:
        cure = "the driver stops launches of seconds; generate fewer tokens a launch"
        yield Finding("gpu", "warn", "also drives a display", cure)
    if card is not None and card.compute_mode == "Prohibited":
        cure = "nvidia-smi -c 0 (as root) lets programs use it"
        yield Finding("gpu", "warn", "in compute mode Prohibited", cure)


def others(cards: list[Card]) -> Finding:
    """What else nvidia-smi lists, with the numbers that it gives."""
    names = ", ".join(f"{c.index}: {c.name} ({c.free} MiB free)" for c in cards)
    cure = "set CUDA_VISIBLE_DEVICES to the UUID that nvidia-smi -L shows to use one of them"
    return Finding("other gpus", "ok", names, cure)


def attributes(driver: ctypes.CDLL, device: ctypes.c_int) -> dict[str, int]:
    """The driver's numbers; 0 where it knows none."""
    value = ctypes.c_int()
    found = {}
    for name, attribute in ATTRIBUTES.items():
        failed = driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found[name] = 0 if failed else value.value
    return found


def gpu_name(driver: ctypes.CDLL, device: ctypes.c_int) -> str:
    """What the driver calls the GPU."""
    name = ctypes.create_string_buffer(256)
    failed = driver.cuDeviceGetName(name, len(name), device)
    return "a GPU without a name" if failed else name.value.decode(errors="replace")


def bus_id(driver: ctypes.CDLL, device: ctypes.c_int) -> str:
    """Domain, bus, device and function of the GPU, as in 0000:0f:00.0; empty: unknown."""
    place = ctypes.create_string_buffer(32)
    failed = driver.cuDeviceGetPCIBusId(place, len(place), device)
    return "" if failed else place.value.decode(errors="replace")


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
