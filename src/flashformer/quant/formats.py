"""How weights are stored: one row a format.

A matrix [rows, cols] is cut into tiles of `TILE_ROWS` rows; a tile is a sequence of blocks along
the columns, each `block_cols` wide: first the block's scales (one float16 a row, if the format has
groups) and zero-points (one byte a row, if it has them), then the codes. Padding rows and columns
stand for zero. After the last block come the row scales (one float32 a row), if the format has
them. How the rows and the codes of a block are ordered is the machine's `layout`. A compact tile
begins with a head, see `quant.compact`.
"""

from dataclasses import dataclass

TILE_ROWS = 16
COMPACT = "bf16c"
COMPACT_HEAD_BYTES = 48  # of a compact tile: a table of 16 bytes, 16 ends of rows (uint16)
EXCEPTION_BYTES = 4  # column and code, both uint16
EXCEPTION_WEIGHTS = 512  # a compact tile has room for one exception in so many weights
COMPACT_MAX_COLS = 1 << 16  # an exception's column has 16 bits
LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight matrix."""

    name: str
    bits: int  # of one code
    block_cols: int  # columns of one block; also the quantisation group where scale is "group"
    scale: str  # none | row (float32, at the tile's end) | group (float16, at the block's start)
    zeros: bool = False  # a zero-point a row and group, behind the scales; otherwise the code 8

    @property
    def floating(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.scale == "none" or self.name == "fp8"

    @property
    def quantised(self) -> bool:
        """Whether codes need a scale to be weights."""
        return self.scale != "none"

    @property
    def block_scale_bytes(self) -> int:
        """Bytes of the scales and zero-points at the start of a block."""
        return (2 + self.zeros) * TILE_ROWS if self.scale == "group" else 0

    @property
    def row_scale_bytes(self) -> int:
        """Bytes of the scales at the end of a tile."""
        return 4 * TILE_ROWS if self.scale == "row" else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: scales and codes of TILE_ROWS x block_cols weights."""
        return self.block_scale_bytes + TILE_ROWS * self.block_cols * self.bits // 8

    def head_bytes(self, cols: int) -> int:
        """Bytes in front of a tile's blocks: the head of a compact tile, in whole cache lines."""
        if self.name != COMPACT:
            return 0
        weights = TILE_ROWS * self.num_blocks(cols) * self.block_cols
        nbytes = COMPACT_HEAD_BYTES + EXCEPTION_BYTES * -(-weights // EXCEPTION_WEIGHTS)
        return -(-nbytes // LINE_BYTES) * LINE_BYTES

    def num_blocks(self, cols: int) -> int:
        """Blocks of a tile with `cols` columns."""
        return -(-cols // self.block_cols)

    def tile_bytes(self, cols: int) -> int:
        """Bytes of one tile: head, blocks, then row scales."""
        blocks = self.num_blocks(cols) * self.block_bytes
        return self.head_bytes(cols) + blocks + self.row_scale_bytes


FORMATS = {
    f.name: f
    for f in (
        Format("f32", 32, 16, "none"),  # fp32 checkpoints on the CPU, exact
        Format("bf16", 16, 16, "none"),
        Format("bf16c", 12, 16, "none"),  # compact: a bfloat16 in 12 bits, without loss
        Format("f16", 16, 16, "none"),
        Format("int8", 8, 32, "row"),  # symmetric, code in [-127, 127]
        Format("fp8", 8, 32, "row"),  # e4m3: 4 bits of exponent, 3 of mantissa, no infinity
        Format("int4", 4, 32, "group"),  # symmetric, code in [0, 15] meaning code - 8
        Format("int4g64", 4, 64, "group"),
        Format("int4g128", 4, 128, "group"),
        Format("int4z", 4, 32, "group", zeros=True),  # code in [0, 15] meaning code - zero-point
        Format("int4g64z", 4, 64, "group", zeros=True),
        Format("int4g128z", 4, 128, "group", zeros=True),
    )
}
# What a user may ask for: how exact weights are. bf16c is a way to store bf16, which the planner
# chooses.
CHOICES = tuple(name for name in FORMATS if name != COMPACT)
QUANTS = tuple(name for name in CHOICES if FORMATS[name].quantised)


def head_format(name: str, kind: str) -> str:
    """How the embedding and the head are stored beside weights of format `name`.

    A GPU keeps them in 8 bits where the others have 4: their rows choose the token, and it has the
    bandwidth.
    """
    return "int8" if kind == "cuda" and FORMATS[name].bits == 4 else name


def storage_format(name: str, cols: int) -> str:
    """How a compact image stores a matrix of format `name`: bf16 as bf16c."""
    return COMPACT if name == "bf16" and cols <= COMPACT_MAX_COLS else name
