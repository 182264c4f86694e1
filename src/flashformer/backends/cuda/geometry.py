"""How the kernel cuts the matrices and the past: kernel/stages.cuh and kernel/past.cuh in Python.

A test compiles both and holds them to each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from flashformer.codegen.cuda_header import (
    MATRICES,
    SAMPLE_SCRATCH_BYTES,
    slot_bytes,
    window_tiles,
)
from flashformer.codegen.exchange import padded
from flashformer.model.spec import LayerSpec
from flashformer.plan.plan import Matrix, Plan
from flashformer.quant.formats import FORMATS, TILE_ROWS, Format

SLOTS_AT_ONCE = 2  # that the consumers multiply
IN_FLIGHT_BYTES = 65536  # on their way to a CTA
NARROW_IN_FLIGHT_BYTES = 49152
LARGE_IN_FLIGHT_BYTES = 98304
LARGE_LAYER_BYTES = 2 << 20  # of a CTA
INTEGER_RUN_COLS = 128
FP8_RUN_COLS = 32
MIN_CHUNK_TOKENS = 256  # shorter chunks of the past cost more to merge than they save


class Rect(NamedTuple):
    """Neighbouring places of neighbouring rows of a buffer."""

    row: int
    row_end: int
    place: int
    place_end: int


@dataclass(frozen=True, slots=True)
class StageShape:
    """A matrix as chunks that fit a slot of the ring (`Stage` of kernel/stages.cuh)."""

    run_cols: int  # columns that a warp multiplies at once
    run_bytes: int
    runs: int  # of a tile
    last_blocks: int  # of the format, in a tile's last run
    tile_bytes: int
    num_chunks: int  # of a tile
    chunk_runs: int  # of all chunks but the last
    window_chunks: int  # of the activations that shared memory holds at once
    group: int  # tiles that share a pass over the windows
    scale_bytes: int  # of the activations' scales, a run
    whole: bool  # shared memory holds all activations, though the tiles take them in windows

    @property
    def last_runs(self) -> int:
        """Of a tile's last chunk."""
        return self.runs - (self.num_chunks - 1) * self.chunk_runs

    @property
    def num_windows(self) -> int:
        """Passes over the activations."""
        return -(-self.num_chunks // self.window_chunks)

    def windows(self) -> Iterator[tuple[int, int]]:
        """First chunk and end of every window."""
        for first in range(0, self.num_chunks, self.window_chunks):
            yield first, min(first + self.window_chunks, self.num_chunks)

    def nbytes(self, first: int, end: int) -> int:
        """Bytes of a tile's chunks."""
        chunk_bytes = self.chunk_runs * self.run_bytes
        ends = self.tile_bytes if end == self.num_chunks else end * chunk_bytes
        return ends - first * chunk_bytes

    def x_bytes(self, rows: int) -> int:
        """Shared memory of the activations of `rows` rows (`Rows` of kernel/format.cuh)."""
        if not self.whole:
            return 2 * rows * self._stride(self.window_chunks * self.chunk_runs)
        return rows * self._stride(self.runs)

    def _stride(self, runs: int) -> int:
        data = runs * self.run_cols * 2
        if self.scale_bytes:
            return -(-(data + self.scale_bytes * runs) // 128) * 128 + 64
        return data + (64 if self.run_cols == FP8_RUN_COLS else 32)


def stage_shape(plan: Plan, matrix: Matrix, rows: int) -> StageShape:
    """The shape of a matrix of `plan` in a kernel of up to `rows` rows a step."""
    weight_format = matrix.weight_format
    run_cols = _run_cols(weight_format)
    run_blocks = run_cols // weight_format.block_cols
    blocks = weight_format.num_blocks(matrix.cols)
    runs = -(-blocks // run_blocks)
    run_bytes = run_blocks * weight_format.block_bytes
    slot_runs = (slot_bytes(plan) - weight_format.row_scale_bytes) // run_bytes
    data, in_windows = runs * run_cols * 2, matrix.name in ("o_proj", "down")
    window_bytes = plan.machine.window_bytes
    wide = in_windows and plan.machine.max_rows * data > 2 * window_bytes
    num_chunks = max(-(-runs // slot_runs), SLOTS_AT_ONCE if wide else 1)
    chunk_runs = -(-runs // num_chunks)
    windowed = in_windows and rows * data > 2 * window_bytes
    early = 0 if windowed else _early_chunks(plan, matrix, num_chunks, chunk_runs * run_cols)
    window = _even_or_one(window_bytes // rows // (data * chunk_runs // runs))
    return StageShape(
        run_cols=run_cols,
        run_bytes=run_bytes,
        runs=runs,
        last_blocks=blocks - (runs - 1) * run_blocks,
        tile_bytes=matrix.tile_bytes,
        num_chunks=num_chunks,
        chunk_runs=chunk_runs,
        window_chunks=window if windowed else early or num_chunks,
        group=min(window_tiles(plan.machine.arch), -(-matrix.num_tiles // plan.machine.num_ctas))
        if windowed or early
        else 1,
        scale_bytes=0 if weight_format.floating else 4,
        whole=not windowed,
    )


def _early_chunks(plan: Plan, matrix: Matrix, num_chunks: int, chunk_cols: int) -> int:
    """Chunks of down's tiles whose columns are not of gate_up's late tiles; 0: no split."""
    if matrix.name != "down":
        return 0
    gate_up = plan.matrix("gate_up", matrix.layer)
    early_tiles = gate_up.num_tiles - gate_up.late * plan.machine.num_ctas
    early = early_tiles * (TILE_ROWS // 2) // chunk_cols // 2 * 2
    return early if gate_up.late and 2 * early >= num_chunks else 0


class Ring(NamedTuple):
    """How a kernel shares the shared memory of its launch."""

    x_bytes: int  # of the activations, and what uses their place
    num_slots: int
    shared_bytes: int  # of both
    in_flight: tuple[int, int]  # see `copies_in_flight`


def copies_in_flight(plan: Plan, rows: int, num_slots: int) -> tuple[int, int]:
    """Copies on their way to a CTA, and while half of its `num_slots` wait to be read.

    For a kernel of up to `rows` rows a step.

    More would only lengthen the queues in which hand-offs wait (docs/lab-notes.md). Narrow weights
    leave the memory less time between two hand-offs, so with them these count for more; in large
    layers for less.
    """
    layer_bytes = sum(plan.matrix(name, 0).nbytes for name in MATRICES) // plan.machine.num_ctas
    if FORMATS[plan.options.format].quantised:
        nbytes = NARROW_IN_FLIGHT_BYTES
    else:
        nbytes = LARGE_IN_FLIGHT_BYTES if layer_bytes >= LARGE_LAYER_BYTES else IN_FLIGHT_BYTES
    most = min(
        nbytes // plan.machine.slot_bytes, most_in_flight(num_slots, odd_windows(plan, rows))
    )
    return most, -(-most // 2)


def odd_windows(plan: Plan, rows: int) -> bool:
    """Whether a window of activations, the last of a tile, has several chunks and an odd number."""
    shapes = [stage_shape(plan, matrix, rows) for matrix in _of_a_layer_and_the_head(plan)]
    return any(
        shape.window_chunks > 1 and shape.num_chunks % 2 == 1
        for shape in shapes
        if shape.num_windows > 1
    )


def most_in_flight(num_slots: int, odd: bool = False) -> int:
    """Copies that may be on their way in a ring of `num_slots` (`MIN_SLOTS` of machine.py or more).

    A barrier knows two phases, so no warp may wait for the fill after next of a slot. The last that
    it has read was started when all before the copies on their way had landed, and it waits for one
    at most three further on: in attention, where a warp reads every other pair of slots. In a ring
    of four slots that one's place it has read itself, but for windows of an odd number of chunks
    (tests/test_cuda_ring.py).
    """
    if num_slots == 4 and odd:
        return 1
    return max(2, num_slots - 3)


def _even_or_one(chunks: int) -> int:
    return max(1, chunks // 2 * 2)


def _run_cols(weight_format: Format) -> int:
    if not weight_format.floating:
        return INTEGER_RUN_COLS
    return FP8_RUN_COLS if weight_format.bits == 8 else weight_format.block_cols


def activation_bytes(plan: Plan, rows: int) -> int:
    """Shared memory of the activations in a kernel of up to `rows` rows, and what uses their place.

    `Cta::x` of kernel/cta.cuh.
    """
    layer = plan.spec.layers[0]
    need = [attention_scratch(layer.head_dim, layer.num_q_heads // layer.num_kv_heads)]
    need.append(SAMPLE_SCRATCH_BYTES)
    shapes = (stage_shape(plan, matrix, rows) for matrix in _of_a_layer_and_the_head(plan))
    need += [shape.x_bytes(rows) for shape in shapes]
    return -(-max(need) // 128) * 128


def _of_a_layer_and_the_head(plan: Plan) -> tuple[Matrix, ...]:
    return plan.matrices[-1 - len(MATRICES) :]


def attention_scratch(head_dim: int, group: int) -> int:
    """Bytes of `AttentionScratch` of kernel/heads.cuh, in the place of activations."""
    output_stride = (min(padded(head_dim), 128) if group <= 4 else 64) + 8
    return 3 * padded(head_dim) * 32 + 4 * 8 * (32 + group * output_stride)


class Past(NamedTuple):
    """What a row sees of its past (`RowPast` of kernel/past.cuh)."""

    first: int  # first visible position
    base: int  # positions stored before the step
    first_page: int
    num_pages: int
    chunk_pages: int
    num_chunks: int


def past_of(plan: Plan, layer: LayerSpec, position: int, base: int) -> Past:
    """The past of a row at `position`."""
    page_tokens = plan.machine.page_tokens
    first = max(0, position - layer.window + 1) if layer.window else 0
    first_page = first // page_tokens
    num_pages = -(-base // page_tokens) - first_page if base > first else 0
    even = -(-num_pages * layer.num_kv_heads // plan.machine.num_ctas)
    chunk_pages = max(-(-MIN_CHUNK_TOKENS // page_tokens), even)
    num_chunks = max(1, -(-num_pages // chunk_pages))
    return Past(first, base, first_page, num_pages, chunk_pages, num_chunks)


def page_bytes(plan: Plan, layer: LayerSpec) -> int:
    """Of the keys, or the values, of one kv head in one page."""
    return plan.machine.page_tokens * padded(layer.head_dim) * 2


class Unit(NamedTuple):
    """A share of attention: one chunk of pages of one row and kv head."""

    row: int
    kv_head: int
    chunk: int
    past: Past

    @property
    def with_own(self) -> bool:
        """Whether it also has the step's own positions."""
        return self.chunk == self.past.num_chunks - 1

    @property
    def pages(self) -> int:
        """Pages of its chunk."""
        end = min(self.past.num_pages, (self.chunk + 1) * self.past.chunk_pages)
        return max(0, end - self.chunk * self.past.chunk_pages)


def units_of(plan: Plan, layer: LayerSpec, positions: list[int]) -> list[list[Unit]]:
    """The units of every CTA, for rows at `positions`, in order (`for_each_unit`)."""
    units: list[list[Unit]] = [[] for _ in range(plan.machine.num_ctas)]
    number = 0
    for row, position in enumerate(positions):
        past = past_of(plan, layer, position, position)
        for chunk in range(past.num_chunks):
            for kv_head in range(layer.num_kv_heads):
                units[number % len(units)].append(Unit(row, kv_head, chunk, past))
                number += 1
    return units


class Merge(NamedTuple):
    """A query head of a row whose past is cut into several chunks."""

    row: int
    head: int
    num_chunks: int


def merges_of(plan: Plan, layer: LayerSpec, positions: list[int]) -> list[list[Merge]]:
    """The heads that every CTA merges (`merge_chunks` of kernel/chunks.cuh)."""
    merges: list[list[Merge]] = [[] for _ in range(plan.machine.num_ctas)]
    number = 0
    for row, position in enumerate(positions):
        num_chunks = past_of(plan, layer, position, position).num_chunks
        if num_chunks == 1:
            continue
        for head in range(layer.num_q_heads):
            merges[len(merges) - 1 - number % len(merges)].append(Merge(row, head, num_chunks))
            number += 1
    return merges
