"""How weights are stored: one row a format.

A matrix [rows, cols] is cut into tiles of `TILE_ROWS` rows; a tile is a sequence of blocks along
the columns, each `block_cols` wide: first the block's scales (one float16 a row, if the format has
groups), then the codes. Padding rows and columns are zero. After the last block come the row
scales (one float32 a row), if the format has them. How the codes of a block are ordered is the
machine's `layout`.
"""

from dataclasses import dataclass

TILE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight matrix."""

    name: str
    bits: int  # of one code
    block_cols: int  # columns of one block; also the quantisation group where scale is "group"
    scale: str  # none | row (float32, at the tile's end) | group (float16, at the block's start)

    @property
    def block_scale_bytes(self) -> int:
        """Bytes of the scales at the start of a block."""
        return 2 * TILE_ROWS if self.scale == "group" else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: scales and codes of TILE_ROWS x block_cols weights."""
        return self.block_scale_bytes + TILE_ROWS * self.block_cols * self.bits // 8

    def num_blocks(self, cols: int) -> int:
        """Blocks of a tile with `cols` columns."""
        return -(-cols // self.block_cols)

    def tile_bytes(self, cols: int) -> int:
        """Bytes of one tile: blocks, then row scales."""
        row_scale_bytes = 4 * TILE_ROWS if self.scale == "row" else 0
        return self.num_blocks(cols) * self.block_bytes + row_scale_bytes


FORMATS = {
    f.name: f
    for f in (
        Format("f32", 32, 16, "none"),  # fp32 checkpoints on the CPU, exact
        Format("bf16", 16, 16, "none"),
        Format("f16", 16, 16, "none"),
        Format("int8", 8, 32, "row"),  # symmetric, code in [-127, 127]
        Format("int4", 4, 32, "group"),  # symmetric, code in [0, 15] meaning code - 8
        Format("int4g128", 4, 128, "group"),
    )
}
