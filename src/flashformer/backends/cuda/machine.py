"""The GPU as the planner sees it: numbers that the driver tells, fitted to one model."""

from dataclasses import dataclass

from cuda.bindings import driver

from flashformer.backends.cuda.geometry import attention_scratch
from flashformer.codegen.cuda_header import SAMPLE_SCRATCH_BYTES
from flashformer.codegen.exchange import padded
from flashformer.errors import UnsupportedModelError, UsageError
from flashformer.model.spec import ModelSpec
from flashformer.plan.machine import Machine
from flashformer.quant.formats import TILE_ROWS

PROMPT_ROWS = 2048  # of a prompt at once: they fill the tensor cores; 60 ms of an 8B model
ROW_CLASSES = (1, 2, 4, 8)  # a kernel is compiled for each; 8 is the width of an mma's operand B
# Bytes of a slot of the ring. It is a bulk copy: one thread cannot keep a fast memory busy with
# small ones, and larger ones than this leave the ring too few.
MOST_SLOT, LEAST_SLOT, SLOT_STEP = 16384, 4096, 1024
WINDOWS = (32768, 16384)  # of activations, in bytes
MIN_SLOTS = 4  # two are multiplied at once, two on their way
PAGE_TOKENS = 64
TRAVELS_FOR = 0.95  # of what the busiest CTA reads: worth the way of the residual to another CTA
SPECIALISED = (9, 10, 12)  # major versions whose own instructions need the suffix "a"


@dataclass(frozen=True, slots=True)
class Device:
    """What the driver says about one GPU."""

    name: str
    major: int
    minor: int
    num_sms: int
    shared_bytes: int  # shared memory that one CTA may have
    cooperative: bool

    @property
    def arch(self) -> str:
        """NVRTC's name of the architecture."""
        suffix = "a" if self.major in SPECIALISED else ""
        return f"sm_{self.major}{self.minor}{suffix}"


def cuda_machine(spec: ModelSpec) -> Machine:
    """The first GPU, with at most as many CTAs as gate_up and the head of `spec` have tiles.

    Whoever reads packets must send some before the next can overwrite them (kernel/packet.cuh).
    Raises `UsageError` without a usable GPU.
    """
    return fit_machine(find_device(), spec)


def fit_machine(device: Device, spec: ModelSpec) -> Machine:
    """The machine that `device` is for `spec`; refuses what the kernel cannot do."""
    if device.major < 8 or not device.cooperative:
        raise UsageError(
            f"{device.name} has compute capability {device.major}.{device.minor}; the CUDA kernel "
            "needs 8.0 or later with cooperative launch; use --device cpu"
        )
    layer = spec.layers[0]
    if layer.head_dim % 8 != 0 or layer.head_dim > 256:
        raise UnsupportedModelError(
            f"head_dim {layer.head_dim}: the CUDA kernel needs a multiple of 8 up to 256; "
            "use --device cpu"
        )
    if odd := [rope.rotary_dim for rope in spec.ropes if rope.rotary_dim % 4]:
        raise UnsupportedModelError(
            f"rotary embeddings of {odd[0]} dims: the CUDA kernel needs a multiple of 4; "
            "use --device cpu"
        )
    if layer.num_q_heads // layer.num_kv_heads > TILE_ROWS:
        raise UnsupportedModelError(
            f"{layer.num_q_heads} query heads on {layer.num_kv_heads} key heads: the CUDA kernel "
            f"needs at most {TILE_ROWS} query heads a key head; use --device cpu"
        )
    rows = min(2 * layer.intermediate_size, spec.vocab_size)
    num_ctas = _even_ctas(spec, min(device.num_sms, -(-rows // TILE_ROWS)))
    head_bytes = padded(layer.head_dim) * 2
    max_rows, slot_bytes, window_bytes = _share_memory(device, spec, num_ctas)
    return Machine(
        kind="cuda",
        name=device.name,
        arch=device.arch,
        num_ctas=num_ctas,
        layout="fragment",
        page_tokens=min(PAGE_TOKENS, 1 << (slot_bytes // head_bytes).bit_length() - 1),
        kv_format="bf16",
        max_rows=max_rows,
        prompt_rows=PROMPT_ROWS,
        shared_bytes=device.shared_bytes,
        slot_bytes=slot_bytes,
        window_bytes=window_bytes,
    )


def row_classes(machine: Machine) -> tuple[int, ...]:
    """The most rows of each kernel that a step may run in."""
    return tuple(rows for rows in ROW_CLASSES if rows <= machine.max_rows)


def _share_memory(device: Device, spec: ModelSpec, num_ctas: int) -> tuple[int, int, int]:
    """Rows of a step, bytes of a slot and of a window.

    The most rows that leave a ring its room, and with them the largest slots.
    """
    least_slot = max(LEAST_SLOT, 16 * padded(spec.layers[0].head_dim) * 2)
    need = 0
    for rows in reversed(ROW_CLASSES):
        found = []
        for window_bytes in WINDOWS:
            beside = _beside_the_ring(spec, num_ctas, rows, window_bytes)
            room = (device.shared_bytes - beside) // MIN_SLOTS * 32 // 33  # a slot has scales, too
            found.append((min(MOST_SLOT, room // SLOT_STEP * SLOT_STEP), window_bytes))
            need = beside + MIN_SLOTS * least_slot * 33 // 32
        slot_bytes, window_bytes = max(found)
        if slot_bytes >= least_slot:
            return rows, slot_bytes, window_bytes
    raise UnsupportedModelError(
        f"{device.name} has {device.shared_bytes} bytes of shared memory for a CTA; one row of "
        f"hidden_size {spec.hidden_size} needs {need}; use --device cpu"
    )


def _beside_the_ring(spec: ModelSpec, num_ctas: int, rows: int, window_bytes: int) -> int:
    """Bytes of shared memory for `Shared` (kernel/cta.cuh) and the activations of `rows` rows."""
    layer = spec.layers[0]
    owned_tiles = -(-spec.hidden_size // (TILE_ROWS * num_ctas))
    rotary = max((rope.rotary_dim for rope in spec.ropes), default=0)
    fixed = 2048 + rows * (2 * 8 * 20 * 4 + owned_tiles * TILE_ROWS * 4 + 128)
    fixed += max(1, len(spec.ropes)) * rows * (rotary // 2 + 1) * 8
    padding = 2 * rows * 256 + 2 * window_bytes // 64  # of rows, and scales
    normed = rows * spec.hidden_size * 65 // 32
    scratch = attention_scratch(layer.head_dim, layer.num_q_heads // layer.num_kv_heads)
    return fixed + padding + max(normed, 2 * window_bytes, scratch, SAMPLE_SCRATCH_BYTES)


def _even_ctas(spec: ModelSpec, most: int) -> int:
    """The fewest CTAs whose busiest one reads least, or at most 0.5 % more.

    Every stage ends with its slowest CTA, so each counts with the most tiles that one CTA gets;
    CTAs with less to do than the others only disturb them (docs/lab-notes.md). More CTAs than tiles
    of the hidden state must be worth the way of the residual between them.
    """
    layer, hidden = spec.layers[0], spec.hidden_size
    matrices = (  # rows, columns, times a step
        (layer.qkv_rows, hidden, spec.num_layers),
        (hidden, layer.q_rows, spec.num_layers),
        (2 * layer.intermediate_size, hidden, spec.num_layers),
        (hidden, layer.intermediate_size, spec.num_layers),
        (spec.vocab_size, hidden, 1),
    )

    def columns_read(num_ctas: int) -> int:
        return sum(n * cols * -(-rows // TILE_ROWS // num_ctas) for rows, cols, n in matrices)

    def fewest(most: int) -> int:
        numbers = range(1, most + 1)
        enough = 1.005 * min(columns_read(n) for n in numbers)
        return next(n for n in numbers if columns_read(n) <= enough)

    at_home, spread = fewest(min(most, -(-hidden // TILE_ROWS))), fewest(most)
    return spread if columns_read(spread) < TRAVELS_FOR * columns_read(at_home) else at_home


def find_device() -> Device:
    """The current process's first GPU. Raises `UsageError` if there is none."""
    (status,) = driver.cuInit(0)
    if int(status) != 0:
        raise UsageError(f"no NVIDIA GPU can be used ({status.name}); use --device cpu")
    status, handle = driver.cuDeviceGet(0)
    if int(status) != 0:
        raise UsageError(f"no NVIDIA GPU was found ({status.name}); use --device cpu")
    attribute = driver.CUdevice_attribute

    def read(name: str) -> int:
        _, value = driver.cuDeviceGetAttribute(
            getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle
        )
        return int(value)

    _, name = driver.cuDeviceGetName(128, handle)
    return Device(
        name=text_before_zero(name),
        major=read("COMPUTE_CAPABILITY_MAJOR"),
        minor=read("COMPUTE_CAPABILITY_MINOR"),
        num_sms=read("MULTIPROCESSOR_COUNT"),
        shared_bytes=read("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        cooperative=bool(read("COOPERATIVE_LAUNCH")),
    )


def text_before_zero(raw: bytes) -> str:
    """A string of C; what lies behind its end in the buffer means nothing."""
    return raw.split(b"\0", 1)[0].decode()
