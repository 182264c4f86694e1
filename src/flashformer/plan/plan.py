"""The plan: who does which tile when, and where every byte lies.

ModelSpec + Machine + PlanOptions -> `Plan`, frozen, printable, checked before it runs.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flashformer.model.spec import LayerSpec, ModelSpec
from flashformer.plan.machine import Machine
from flashformer.plan.tiles import Tiles, stored_tiles
from flashformer.quant.formats import FORMATS, LINE_BYTES, TILE_ROWS, Format, storage_format

PLAN_VERSION = 2  # raise it when the same numbers mean something else
IMAGE_VERSION = 1  # raise it when the same plan packs other bytes
IMAGE_ALIGNMENT = 4096  # bytes: a matrix starts on a page
VECTOR_ALIGNMENT = 64  # bytes: a vector starts on a cache line
KV_BYTES = {"f32": 4, "f16": 2, "bf16": 2}  # of one stored key or value element
VECTOR_PADDING = 128  # elements: zeros follow a vector up to the widest block of any format


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user may choose."""

    format: str = "bf16"  # of every weight matrix, a key of quant.formats.FORMATS
    head_format: str = "bf16"  # of the embedding and the output head (one matrix when tied)
    context: int = 4096  # tokens a sequence may hold
    max_batch: int = 8  # sequences in one step
    plain: tuple[tuple[str, int], ...] = ()  # matrices (name, layer) that bf16c does not fit


def matrix_format(machine: Machine, options: PlanOptions, name: str, layer: int, cols: int) -> str:
    """The format in which the image of `machine` stores a matrix."""
    wanted = options.head_format if name in ("embed_tokens", "lm_head") else options.format
    if machine.compact and (name, layer) not in options.plain:
        return storage_format(wanted, cols)
    return wanted


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix in the image: ceil(rows / 16) tiles, one after the other."""

    # qkv (rows of q, then k, then v) | o_proj | gate_up | down | lm_head | embed_tokens (if untied)
    name: str
    layer: int  # -1: lm_head, embed_tokens
    rows: int  # true rows; of gate_up: 2 x intermediate_size
    cols: int  # true columns
    format: str
    offset: int  # bytes from the start of the image, a multiple of 4096
    first_tile: tuple[
        int, ...
    ]  # [num_ctas + 1]: CTA c owns tiles first_tile[c] .. first_tile[c + 1]
    late: int = 0  # of a CTA's tiles, those that come from the matrix's end (`tiles.stored_tiles`)

    @property
    def num_tiles(self) -> int:
        """Tiles of 16 rows; of gate_up: 8 gate rows, then the 8 up rows of the same index."""
        if self.name == "gate_up":
            return -(-(self.rows // 2) // (TILE_ROWS // 2))
        return -(-self.rows // TILE_ROWS)

    @property
    def stored_tiles(self) -> Tiles:
        """Which tile, counted by rows, lies at every place: [num_tiles]."""
        return stored_tiles(self.first_tile, self.late)

    @property
    def places(self) -> Tiles:
        """At which place every tile, counted by rows, lies: the inverse of `stored_tiles`."""
        return np.argsort(self.stored_tiles)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return self.weight_format.tile_bytes(self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in the image."""
        return self.num_tiles * self.tile_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that a step reads at least: without the room for exceptions in heads of tiles."""
        unread = max(self.weight_format.head_bytes(self.cols) - LINE_BYTES, 0)
        return self.nbytes - self.num_tiles * unread

    @property
    def weight_format(self) -> Format:
        """The row of the format table."""
        return FORMATS[self.format]


@dataclass(frozen=True, slots=True)
class Vector:
    """One float32 vector in the image (norm weight, bias, RoPE frequencies)."""

    # a role of model.weights, inv_freq, or qkv_bias, gate_up_bias (rows as the matrix stores them)
    name: str
    layer: int  # -1: the model; of inv_freq: the RoPE's index
    length: int  # true elements; of a bias: 16 x the matrix's tiles, padding rows included
    offset: int  # bytes from the start of the image, a multiple of 64

    @property
    def nbytes(self) -> int:
        """Bytes in the image, the zeros that follow up to VECTOR_PADDING elements included."""
        return -(-self.length // VECTOR_PADDING) * VECTOR_PADDING * 4


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the schedule between two barriers."""

    name: str  # embed | qkv | attention | o_proj | gate_up | down | lm_head | sample
    layer: int  # -1 outside the layers
    reads: tuple[str, ...]  # buffers
    writes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the code generator, the packer and the backends need."""

    spec: ModelSpec
    machine: Machine
    options: PlanOptions
    stages: tuple[Stage, ...]
    matrices: tuple[Matrix, ...]  # in the order in which one token reads them
    vectors: tuple[Vector, ...]
    image_bytes: int
    attention_factors: tuple[float, ...]  # of every RoPE: multiplies cos and sin

    def matrix(self, name: str, layer: int = -1) -> Matrix:
        """The matrix of a name and layer."""
        return next(m for m in self.matrices if m.name == name and m.layer == layer)

    def vector(self, name: str, layer: int = -1) -> Vector:
        """The vector of a name and layer."""
        return next(v for v in self.vectors if v.name == name and v.layer == layer)

    @property
    def key(self) -> str:
        """sha256 of everything that decides the image's bytes or the kernel's code."""
        return _sha256({"plan_version": PLAN_VERSION, **self.to_json()})

    @property
    def image_key(self) -> str:
        """sha256 of what decides the image's bytes, given the weights.

        Machines, contexts and batches that pack the same bytes share an image.
        """
        frequencies = [r.frequencies(self.options.context)[0] for r in self.spec.ropes]
        return _sha256(
            {
                "image_version": IMAGE_VERSION,
                "layout": self.machine.layout,
                "world": [self.machine.world, self.machine.rank],
                "matrices": [
                    (m.name, m.layer, m.rows, m.cols, m.format, m.offset)
                    + ((m.late, m.first_tile) if m.late else ())
                    for m in self.matrices
                ],
                "vectors": [asdict(v) for v in self.vectors],
                "frequencies": [np.asarray(f, dtype="<f4").tobytes().hex() for f in frequencies],
                "image_bytes": self.image_bytes,
            }
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one position, all layers."""
        return sum(self.kv_bytes_of(layer) for layer in self.spec.layers)

    def kv_bytes_of(self, layer: LayerSpec) -> int:
        """Bytes of the key and the value of one position in one layer."""
        return 2 * layer.kv_rows * KV_BYTES[self.machine.kv_format]

    def bytes_per_step(self, context: int, batch: int = 1) -> int:
        """Bytes that one decode step must read: weights once, keys and values of every sequence.

        `context` is the number of positions that a row attends to, itself included. Every matrix
        counts with its scales and padding; an untied embedding with one row a sequence.
        """
        total = sum(v.nbytes for v in self.vectors)
        for matrix in self.matrices:
            gathered = matrix.name == "embed_tokens"
            total += batch * matrix.tile_bytes // TILE_ROWS if gathered else matrix.read_bytes
        for layer in self.spec.layers:
            seen = min(context, layer.window) if layer.window else context
            total += batch * seen * self.kv_bytes_of(layer)
        return total

    def to_json(self) -> dict[str, Any]:
        """The whole plan as JSON types; `json.dumps` of it is the same for equal plans."""
        return dict(json.loads(json.dumps(asdict(self))))


def make_plan(spec: ModelSpec, machine: Machine, options: PlanOptions) -> Plan:
    """Plan the whole model: stages, tiles of every CTA, offsets of every byte; checked.

    Raises `UsageError` for options that make no sense for this model (a context beyond its
    positions), `PlanError` for a plan that breaks an invariant of `plan/check.py`.
    """
    from flashformer.plan.planner import plan_model

    return plan_model(spec, machine, options)


def _sha256(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
