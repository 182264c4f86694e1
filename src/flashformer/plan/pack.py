"""Plan + weights -> the image: every matrix in the order in which its CTAs read it.

`pack` writes, `unpack` reads back what the image says as float32.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from flashformer.errors import CheckpointError
from flashformer.model.weights import Array, WeightSource
from flashformer.plan.plan import IMAGE_ALIGNMENT, Matrix, Plan, Vector
from flashformer.quant.decode import decode
from flashformer.quant.encode import Encoded, Float32, encode, widen
from flashformer.quant.formats import TILE_ROWS
from flashformer.quant.layout import arrange, restore

Image = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]  # what ("packing"), bytes done, bytes in all

PACK_THREADS = 2
DAMAGED = "holds NaN or infinite values: the checkpoint is damaged; download or convert it again"
EXPONENT_MASKS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}
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


def pack(plan: Plan, weights: WeightSource, image: Image, progress: Progress | None = None) -> None:
    """Fill `image` [plan.image_bytes] with the weights.

    Reads tensors one matrix at a time through two threads and needs less than 64 MB beside the
    image. Raises `CheckpointError` for a tensor that is missing, misshapen, not finite, or too
    large for the format.
    """
    if image.nbytes != plan.image_bytes:
        raise ValueError(f"the image has {image.nbytes} bytes; the plan needs {plan.image_bytes}")
    for vector in plan.vectors:
        _pack_vector(plan, vector, weights, image)
    total = sum(m.nbytes for m in plan.matrices)
    done = 0
    with ThreadPoolExecutor(PACK_THREADS, thread_name_prefix="pack") as threads:
        for matrix in plan.matrices:
            for num_tiles in _pack_matrix(plan, matrix, weights, image, threads):
                done += num_tiles * matrix.tile_bytes
                if progress is not None:
                    progress("packing", done, total)
            _release(weights, matrix)


def unpack(plan: Plan, image: Image, matrix: Matrix) -> Float32:
    """The weights of `matrix` as the image holds them: float32 [rows, cols]; gate, then up."""
    tiled = unpack_tiles(plan, image, matrix, 0, matrix.num_tiles)
    if matrix.name == "gate_up":
        halves = tiled.reshape(matrix.num_tiles, 2, TILE_ROWS // 2, matrix.cols)
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
    blocks, row_scales = _tile_views(image, matrix, first, end)
    weight_format = matrix.weight_format
    scale_bytes = weight_format.block_scale_bytes
    codes = restore(blocks[..., scale_bytes:], weight_format, plan.machine.layout)
    codes = codes.reshape(-1, codes.shape[2])
    scales = None
    if weight_format.scale == "group":
        stored = blocks[..., :scale_bytes].view(np.float16)  # [tiles, blocks, 16]
        scales = stored.transpose(0, 2, 1).reshape(codes.shape[0], -1)
    elif weight_format.scale == "row":
        scales = row_scales.reshape(-1)
    return decode(Encoded(codes, scales), weight_format)[:, : matrix.cols]


def read_vector(image: Image, vector: Vector) -> Float32:
    """A view of a vector: float32 [length]."""
    end = vector.offset + 4 * vector.length
    view: Float32 = image[vector.offset : end].view(np.float32)
    return view


def _tile_views(image: Image, matrix: Matrix, first: int, end: int) -> tuple[Any, Any]:
    """Views of tiles: blocks uint8 [tiles, blocks, block bytes], row scales float32 [tiles, 16]."""
    weight_format, size = matrix.weight_format, matrix.tile_bytes
    start = matrix.offset + first * size
    tiles = image[start : matrix.offset + end * size].reshape(end - first, size)
    num_blocks = weight_format.num_blocks(matrix.cols)
    split = num_blocks * weight_format.block_bytes
    return tiles[:, :split].reshape(end - first, num_blocks, -1), tiles[:, split:].view(np.float32)


def _pack_matrix(
    plan: Plan, matrix: Matrix, weights: WeightSource, image: Image, threads: ThreadPoolExecutor
) -> Iterator[int]:
    """Pack one matrix; yields the number of tiles of every finished job."""
    tensors = {role: weights.tensor(role, matrix.layer) for role in MATRIX_ROLES[matrix.name]}
    if len({t.dtype for t in tensors.values()}) > 1:
        tensors = {role: widen(t) for role, t in tensors.items()}

    def job(span: tuple[int, int]) -> int:
        first, end = span
        rows = _stored_rows(matrix, tensors, first, end)
        _pack_tiles(plan, matrix, rows, image, first, end)
        return end - first

    step = max(1, JOB_WEIGHTS // (TILE_ROWS * matrix.cols))
    starts = range(0, matrix.num_tiles, step)
    yield from threads.map(job, [(a, min(a + step, matrix.num_tiles)) for a in starts])
    end = matrix.offset + matrix.nbytes
    image[end : -(-end // IMAGE_ALIGNMENT) * IMAGE_ALIGNMENT] = 0


def _stored_rows(matrix: Matrix, tensors: dict[str, Array], first: int, end: int) -> Array:
    """Source rows of tiles `first` .. `end` in stored order, padded with zeros: [16 x tiles, cols].

    The columns are padded to whole blocks.
    """
    cols = matrix.weight_format.num_blocks(matrix.cols) * matrix.weight_format.block_cols
    if matrix.name == "gate_up":
        half = TILE_ROWS // 2
        parts = [{role: tensor} for role, tensor in tensors.items()]
        halves = [_slice_rows(matrix, p, first * half, end * half, cols) for p in parts]
        return np.stack([h.reshape(-1, half, cols) for h in halves], axis=1).reshape(-1, cols)
    return _slice_rows(matrix, tensors, first * TILE_ROWS, end * TILE_ROWS, cols)


def _slice_rows(
    matrix: Matrix, tensors: dict[str, Array], start: int, stop: int, cols: int
) -> Array:
    """Rows `start` .. `stop` of the tensors one below the other, padded with zeros."""
    rows: Array | None = None
    base = 0
    for role, tensor in tensors.items():
        low, high = max(start - base, 0), min(stop - base, tensor.shape[0])
        if low < high:
            piece = tensor[low:high]
            _require_finite(piece, role, matrix.layer, DAMAGED)
            if piece.shape == (stop - start, cols):
                return piece
            if rows is None:
                rows = np.zeros((stop - start, cols), tensor.dtype)
            rows[base + low - start : base + high - start, : tensor.shape[1]] = piece
        base += tensor.shape[0]
    if rows is None:
        raise ValueError(f"tiles of {matrix.name} hold no row {start} .. {stop}")
    return rows


def _pack_tiles(
    plan: Plan, matrix: Matrix, rows: Array, image: Image, first: int, end: int
) -> None:
    weight_format = matrix.weight_format
    blocks, row_scales = _tile_views(image, matrix, first, end)
    codes, scales = encode(rows, weight_format)
    if codes.dtype != rows.dtype:
        checked, role = codes if scales is None else scales, MATRIX_ROLES[matrix.name][0]
        complaint = f"(or its neighbours in {matrix.name}) has values too large for the format "
        _require_finite(checked, role, matrix.layer, f"{complaint}{weight_format.name}; use bf16")
    scale_bytes = weight_format.block_scale_bytes
    shaped = codes.reshape(end - first, TILE_ROWS, -1)
    arrange(shaped, weight_format, plan.machine.layout, blocks[..., scale_bytes:])
    if scales is not None and weight_format.scale == "row":
        row_scales[...] = scales.reshape(row_scales.shape)
    elif scales is not None:
        stored = blocks[..., :scale_bytes].view(np.float16)
        stored[...] = scales.reshape(end - first, TILE_ROWS, -1).transpose(0, 2, 1)


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
        _require_finite(values, role, vector.layer, DAMAGED)
        parts.append(values)
    if vector.name != "gate_up_bias":
        return _padded(np.concatenate(parts), vector.length)
    half = TILE_ROWS // 2
    halves = [_padded(p, vector.length // 2).reshape(-1, half) for p in parts]
    return np.stack(halves, axis=1).reshape(-1)


def _padded(values: Float32, length: int) -> Float32:
    return np.pad(values, (0, length - len(values)))


def _require_finite(array: Array, role: str, layer: int, complaint: str) -> None:
    if not is_finite(array):
        where = "" if layer < 0 else f" of layer {layer}"
        raise CheckpointError(f"the tensor {role}{where} {complaint}")


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite."""
    mask = EXPONENT_MASKS.get(array.dtype.name)
    if mask is None or not array.size:
        return bool(np.isfinite(array).all())
    # All exponent bits set means NaN or infinity; integers are several times faster than isfinite.
    return bool((array.view(np.uint16) & mask).max() != mask)


def _release(weights: WeightSource, matrix: Matrix) -> None:
    """Let a memory-mapped source drop the pages of the tensors that were just read."""
    release = getattr(weights, "release", None)
    if release is not None:
        for role in MATRIX_ROLES[matrix.name]:
            release(role, matrix.layer)
