"""How the kernel cuts the matrices and the past: kernel/stages.cuh and kernel/past.cuh in Python.

A test compiles both and holds them to each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from flashformer.codegen.cuda_header import SLOT_BYTES, WINDOW_BYTES, window_tiles
from flashformer.codegen.exchange import padded
from flashformer.model.spec import LayerSpec
from flashformer.plan.plan import Matrix, Plan

FRAGMENT_BYTES = 512  # of 16 rows and 16 columns, 16 bits each
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

    fragments: int  # of a tile
    num_chunks: int  # of a tile
    chunk_fragments: int  # of all chunks but the last
    window_chunks: int  # of the activations that shared memory holds at once
    group: int  # tiles that share a pass over the windows

    @property
    def last_fragments(self) -> int:
        """Of a tile's last chunk."""
        return self.fragments - (self.num_chunks - 1) * self.chunk_fragments

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
        last = end == self.num_chunks
        fragments = (end - first - last) * self.chunk_fragments + last * self.last_fragments
        return fragments * FRAGMENT_BYTES


def stage_shape(matrix: Matrix, max_rows: int, arch: str) -> StageShape:
    """The shape of `matrix` in a kernel for `arch` of up to `max_rows` rows a step."""
    fragments = padded(matrix.cols) // 16
    num_chunks = -(-fragments // (SLOT_BYTES // FRAGMENT_BYTES))
    chunk_fragments = -(-fragments // num_chunks)
    windowed = max_rows * (padded(matrix.cols) * 2 + 32) > 2 * (WINDOW_BYTES + 32 * max_rows)
    window = WINDOW_BYTES // max_rows // (chunk_fragments * 32) if windowed else num_chunks
    group = window_tiles(arch) if windowed else 1
    return StageShape(fragments, num_chunks, chunk_fragments, window, group)


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
