"""The plan: who does which tile when, and where every byte lies.

ModelSpec + Machine + PlanOptions -> `Plan`, frozen, printable, checked before it runs.
"""

from dataclasses import dataclass

from flashformer.model.spec import ModelSpec
from flashformer.plan.machine import Machine
from flashformer.quant.formats import FORMATS, TILE_ROWS, Format


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user may choose."""

    format: str = "bf16"  # of every weight matrix, a key of quant.formats.FORMATS
    head_format: str = "bf16"  # of the embedding and the output head (one matrix when tied)
    context: int = 4096  # tokens a sequence may hold
    max_batch: int = 8  # sequences in one step


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix in the image: ceil(rows / 16) tiles, one after the other."""

    name: str  # qkv (rows of q, then k, then v) | o_proj | gate_up | down | lm_head | embed_tokens (only if untied)
    layer: int  # -1: lm_head, embed_tokens
    rows: int  # true rows; of gate_up: 2 x intermediate_size
    cols: int  # true columns
    format: str
    offset: int  # bytes from the start of the image, a multiple of 4096
    first_tile: tuple[
        int, ...
    ]  # [num_ctas + 1]: CTA c owns tiles first_tile[c] .. first_tile[c + 1]

    @property
    def num_tiles(self) -> int:
        """Tiles of TILE_ROWS rows; a tile of gate_up holds 8 gate rows, then the 8 up rows of the same index."""
        if self.name == "gate_up":
            return -(-(self.rows // 2) // (TILE_ROWS // 2))
        return -(-self.rows // TILE_ROWS)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return self.weight_format.tile_bytes(self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in the image."""
        return self.num_tiles * self.tile_bytes

    @property
    def weight_format(self) -> Format:
        """The row of the format table."""
        return FORMATS[self.format]


@dataclass(frozen=True, slots=True)
class Vector:
    """One float32 vector in the image (norm weight, bias, RoPE frequencies)."""

    name: str  # a role of model.weights, "qkv_bias", "gate_up_bias" (rows as the matrix stores them) or "inv_freq"
    layer: int  # -1: the model; of inv_freq: the RoPE's index
    length: int
    offset: int  # bytes from the start of the image, a multiple of 64


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

    def matrix(self, name: str, layer: int = -1) -> Matrix:
        """The matrix of a name and layer."""
        return next(m for m in self.matrices if m.name == name and m.layer == layer)

    def vector(self, name: str, layer: int = -1) -> Vector:
        """The vector of a name and layer."""
        return next(v for v in self.vectors if v.name == name and v.layer == layer)
