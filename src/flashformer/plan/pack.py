"""Plan + weights -> the image: every matrix in the order in which its CTAs read it.

`pack` writes, `unpack` reads back what the image says as float32.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flashformer.errors import CheckpointError
from flashformer.model.checkpoint import check_finite
from flashformer.model.weights import Array, WeightSource
from flashformer.plan.plan import Matrix, Plan, Vector
from flashformer.plan.tiles import Tiles
from flashformer.quant.compact import arrange_compact, restore_compact
from flashformer.quant.decode import decode
from flashformer.quant.encode import Encoded, Float32, encode, widen
from flashformer.quant.formats import COMPACT, TILE_ROWS, Format
from flashformer.quant.layout import arrange, restore, scale_rows

Image = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]  # what ("packing"), bytes done, bytes in all

PACK_THREADS = 2
JOB_WEIGHTS = 1 << 19  # weights of one job: its temporaries stay below 16 MB and near the caches

# matrix -> the roles whose rows it holds, in order; gate_up interleaves its two
MATRIX_ROLES = {
    "embed_tokens": ("embed_tokens",),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "lm_head": ("lm_head",),
}
BIAS_ROLES = {
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}


class IncompressibleError(Exception):
    """Matrices (name, layer) of a plan whose weights do not fit its compact format."""

    def __init__(self, matrices: tuple[tuple[str, int], ...]) -> None:
        super().__init__(f"bf16 weights that need more than 12 bits: {matrices}")
        self.matrices = matrices


def pack(plan: Plan, weights: WeightSource, image: Image, progress: Progress | None = None) -> None:
    """Fill `image` [plan.image_bytes] with the weights.

    Reads one matrix at a time with two threads, releases the rows that were read, and needs less
    than 64 MB beside the image. Raises `CheckpointError` for a tensor that is missing, misshapen,
    not finite, or too large for the format; `IncompressibleError` with all matrices that have more
    exceptions than bf16c has room for.
    """
    if image.nbytes != plan.image_bytes:
        raise ValueError(f"the image has {image.nbytes} bytes; the plan needs {plan.image_bytes}")
    for vector in plan.vectors:
        _pack_vector(plan, vector, weights, image)
    _clear_gaps(plan, image)
    total = sum(m.nbytes for m in plan.matrices)
    done = 0
    with ThreadPoolExecutor(PACK_THREADS, thread_name_prefix="pack") as threads:
        refused: list[tuple[str, int]] = []
        for matrix in plan.matrices:
            try:
                for num_tiles in _pack_matrix(plan, matrix, weights, image, threads):
                    done += num_tiles * matrix.tile_bytes
                    if progress is not None:
                        progress("packing", done, total)
            except IncompressibleError as found:
                refused += found.matrices
    if refused:
        raise IncompressibleError(tuple(refused))


class _Span(NamedTuple):
    """Rows of a tensor that belong to a job."""

    role: str
    first: int
    end: int
    at: int  # where they go in the job's rows; of gate_up in those of the role


def unpack(plan: Plan, image: Image, matrix: Matrix) -> Float32:
    """The weights of `matrix` as the image holds them: float32 [rows, cols]; gate, then up."""
    tiled = unpack_tiles(plan, image, matrix, 0, matrix.num_tiles)
    if matrix.name == "gate_up":
        halves = tiled.reshape(matrix.num_tiles, 2, TILE_ROWS // 2, matrix.cols)
        halves = halves[matrix.places]
        gate, up = (halves[:, i].reshape(-1, matrix.cols)[: matrix.rows // 2] for i in (0, 1))
        return np.concatenate([gate, up])
    return tiled[: matrix.rows]


def unpack_rows(plan: Plan, image: Image, matrix: Matrix, rows: npt.NDArray[Any]) -> Float32:
    """Rows of a matrix that is stored in row order (not gate_up): float32 [len(rows), cols]."""
    picked = [unpack_tiles(plan, image, matrix, r // TILE_ROWS, r // TILE_ROWS + 1) for r in rows]
    if not picked:
        return np.zeros((0, matrix.cols), np.float32)
    return np.stack([tile[r % TILE_ROWS] for tile, r in zip(picked, rows, strict=True)])


def unpack_tiles(plan: Plan, image: Image, matrix: Matrix, first: int, end: int) -> Float32:
    """Tiles `first` .. `end` as stored, padding rows included: float32 [16 x tiles, cols]."""
    if first == end:  # a CTA without tiles
        return np.zeros((0, matrix.cols), np.float32)
    heads, blocks, row_scales = _tile_views(image, matrix, first, end)
    weight_format = matrix.weight_format
    scale_bytes = weight_format.block_scale_bytes
    if weight_format.name == COMPACT:
        codes = restore_compact(heads, blocks)
    else:
        codes = restore(blocks[..., scale_bytes:], weight_format, plan.machine.layout)
    codes = codes.reshape(-1, codes.shape[2])
    scales = zeros = None
    if weight_format.scale == "row":
        scales = row_scales.reshape(-1)
    elif weight_format.scale == "group":
        group_scales, zero_points = _group_views(blocks, weight_format)
        scales = _by_rows(group_scales, plan.machine.layout)
        zeros = _by_rows(zero_points, plan.machine.layout) if weight_format.zeros else None
    return decode(Encoded(codes, scales, zeros), weight_format)[:, : matrix.cols]


def read_vector(image: Image, vector: Vector) -> Float32:
    """A view of a vector: float32 [length]."""
    end = vector.offset + 4 * vector.length
    view: Float32 = image[vector.offset : end].view(np.float32)
    return view


def _tile_views(image: Image, matrix: Matrix, first: int, end: int) -> tuple[Any, Any, Any]:
    """Views of tiles: heads [tiles, head bytes], blocks [tiles, blocks, block bytes], row scales.

    The first two are uint8, the row scales float32 [tiles, 16].
    """
    weight_format, size = matrix.weight_format, matrix.tile_bytes
    start = matrix.offset + first * size
    tiles = image[start : matrix.offset + end * size].reshape(end - first, size)
    num_blocks = weight_format.num_blocks(matrix.cols)
    head = weight_format.head_bytes(matrix.cols)
    split = head + num_blocks * weight_format.block_bytes
    blocks = tiles[:, head:split].reshape(end - first, num_blocks, -1)
    return tiles[:, :head], blocks, tiles[:, split:].view(np.float32)


def _group_views(blocks: Image, weight_format: Format) -> tuple[Any, Any]:
    """Views [tiles, blocks, 16] of the blocks' scales and zero-points."""
    split = 2 * TILE_ROWS
    scales = blocks[..., :split].view(np.float16)
    return scales, blocks[..., split : weight_format.block_scale_bytes]


def _by_rows(stored: npt.NDArray[Any], layout: str) -> npt.NDArray[Any]:
    """[tiles, blocks, 16] as the layout orders a tile's rows -> [16 x tiles, blocks]."""
    tiles, blocks, _ = stored.shape
    found = np.empty((tiles, TILE_ROWS, blocks), stored.dtype)
    found[:, scale_rows(layout)] = stored.transpose(0, 2, 1)
    return found.reshape(-1, blocks)


def _pack_matrix(
    plan: Plan, matrix: Matrix, weights: WeightSource, image: Image, threads: ThreadPoolExecutor
) -> Iterator[int]:
    """Pack one matrix; yields the number of tiles of every finished job."""
    tensors = {role: weights.tensor(role, matrix.layer) for role in MATRIX_ROLES[matrix.name]}
    stored = matrix.stored_tiles

    def job(first: int) -> int:
        end = min(first + step, matrix.num_tiles)
        spans = _spans(matrix, tensors, stored[first:end])
        rows = _stored_rows(matrix, tensors, spans, end - first)
        _pack_tiles(plan, matrix, rows, image, first, end)
        for span in spans:  # a memory-mapped source may drop the pages that were just read
            weights.release(span.role, matrix.layer, span.first, span.end - span.first)
        return end - first

    step = max(1, JOB_WEIGHTS // (TILE_ROWS * matrix.cols))
    yield from threads.map(job, range(0, matrix.num_tiles, step))


def _spans(matrix: Matrix, tensors: dict[str, Array], tiles: Tiles) -> list[_Span]:
    """The source rows of neighbouring places of the image that hold `tiles`."""
    if matrix.name == "gate_up":
        half = TILE_ROWS // 2
        return [
            _Span(role, start * half, min(stop * half, len(tensor)), at * half)
            for role, tensor in tensors.items()
            for at, start, stop in _neighbours(tiles)
        ]
    start, stop, base = int(tiles[0]) * TILE_ROWS, (int(tiles[-1]) + 1) * TILE_ROWS, 0
    spans = []
    for role, tensor in tensors.items():
        low, high = max(start - base, 0), min(stop - base, len(tensor))
        if low < high:
            spans.append(_Span(role, low, high, base + low - start))
        base += len(tensor)
    return spans


def _neighbours(tiles: Tiles) -> Iterator[tuple[int, int, int]]:
    """Runs of tiles that follow each other: place of the first, first, end."""
    starts = np.flatnonzero(np.diff(tiles, prepend=-2) != 1)
    for at, stop in pairwise([*starts.tolist(), len(tiles)]):
        yield at, int(tiles[at]), int(tiles[stop - 1]) + 1


def _stored_rows(
    matrix: Matrix, tensors: dict[str, Array], spans: list[_Span], num_tiles: int
) -> Array:
    """Source rows in stored order, padded with zeros to whole tiles and blocks."""
    cols = matrix.weight_format.num_blocks(matrix.cols) * matrix.weight_format.block_cols
    pieces = [tensors[span.role][span.first : span.end] for span in spans]
    for span, piece in zip(spans, pieces, strict=True):
        check_finite(piece, _label(span.role, matrix.layer))
    if pieces[0].shape == (num_tiles * TILE_ROWS, cols):
        return pieces[0]
    same = len({piece.dtype for piece in pieces}) == 1
    rows = np.zeros((num_tiles * TILE_ROWS, cols), pieces[0].dtype if same else np.float32)
    parts, half = list(tensors), TILE_ROWS // 2
    for span, piece in zip(spans, pieces, strict=True):
        if matrix.name == "gate_up":
            index = span.at + np.arange(len(piece))
            at = index // half * TILE_ROWS + parts.index(span.role) * half + index % half
            rows[at, : matrix.cols] = piece
        else:
            rows[span.at : span.at + len(piece), : matrix.cols] = piece
    return rows


def _pack_tiles(
    plan: Plan, matrix: Matrix, rows: Array, image: Image, first: int, end: int
) -> None:
    weight_format = matrix.weight_format
    heads, blocks, row_scales = _tile_views(image, matrix, first, end)
    codes, scales, zeros = encode(rows, weight_format)
    if codes.dtype != rows.dtype and not np.isfinite(codes if scales is None else scales).all():
        raise CheckpointError(
            f"{_label(matrix.name, matrix.layer)} has weights too large for the format "
            f"{weight_format.name}; choose bf16."
        )
    scale_bytes = weight_format.block_scale_bytes
    shaped = codes.reshape(end - first, TILE_ROWS, -1)
    if weight_format.name == COMPACT:
        if not arrange_compact(shaped, heads, blocks):
            raise IncompressibleError(((matrix.name, matrix.layer),))
        return
    arrange(shaped, weight_format, plan.machine.layout, blocks[..., scale_bytes:])
    if scales is not None and weight_format.scale == "row":
        row_scales[...] = scales.reshape(row_scales.shape)
    elif scales is not None:
        rows_of = scale_rows(plan.machine.layout)
        for stored, values in zip(
            _group_views(blocks, weight_format), (scales, zeros), strict=True
        ):
            if values is not None:
                by_tile = values.reshape(end - first, TILE_ROWS, -1)
                stored[...] = by_tile[:, rows_of].transpose(0, 2, 1)


def _pack_vector(plan: Plan, vector: Vector, weights: WeightSource, image: Image) -> None:
    target = image[vector.offset : vector.offset + vector.nbytes].view(np.float32)
    target[...] = 0
    target[: vector.length] = _vector_values(plan, vector, weights)


def _vector_values(plan: Plan, vector: Vector, weights: WeightSource) -> Float32:
    """float32 [vector.length], biases in the order of the matrix's stored rows."""
    if vector.name == "inv_freq":
        return plan.spec.ropes[vector.layer].frequencies(plan.options.context)[0]
    parts = []
    for role in BIAS_ROLES.get(vector.name, (vector.name,)):
        values = widen(weights.tensor(role, vector.layer))
        check_finite(values, _label(role, vector.layer))
        parts.append(values)
    if vector.name != "gate_up_bias":
        return _padded(np.concatenate(parts), vector.length)
    half = TILE_ROWS // 2
    halves = [_padded(p, vector.length // 2).reshape(-1, half) for p in parts]
    stored = plan.matrix("gate_up", vector.layer).stored_tiles
    return np.stack(halves, axis=1)[stored].reshape(-1)


def _padded(values: Float32, length: int) -> Float32:
    return np.pad(values, (0, length - len(values)))


def _clear_gaps(plan: Plan, image: Image) -> None:
    """Zero what belongs to no matrix or vector, so that equal weights give equal images."""
    items: list[Vector | Matrix] = [*plan.vectors, *plan.matrices]
    items.sort(key=lambda item: item.offset)
    ends = [item.offset for item in items[1:]] + [plan.image_bytes]
    for item, end in zip(items, ends, strict=True):
        image[item.offset + item.nbytes : end] = 0


def _label(name: str, layer: int) -> str:
    return name if layer < 0 else f"{name} of layer {layer}"
