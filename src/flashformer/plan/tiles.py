"""Who gets which tiles: a contiguous split of a matrix over the CTAs, balanced by bytes."""

import numpy as np
import numpy.typing as npt

Tiles = npt.NDArray[np.intp]


def split_tiles(num_tiles: int, num_ctas: int, *, shifted: bool = False) -> tuple[int, ...]:
    """First tile of every CTA, and the end: [num_ctas + 1].

    The tiles of a matrix have equal bytes, so equal counts are equal bytes: no CTA has more than
    one tile more than another. The larger shares are spread evenly over the CTAs; `shifted` gives
    them to other CTAs, as far as possible.
    """
    shift = num_ctas // 2 if shifted else 0
    return tuple((cta * num_tiles + shift) // num_ctas for cta in range(num_ctas + 1))


def dealt_tiles(first_tile: tuple[int, ...]) -> Tiles:
    """Which tile, by rows, lies at every place of the image if they are dealt out in turns.

    Every CTA has neighbouring places (`first_tile`), and of every turn the tile whose number in it
    is the CTA's; of an incomplete last turn those CTAs that have a place more.
    """
    first = np.array(first_tile)
    counts = np.diff(first)
    owner = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(first[-1]) - first[owner]
    full = first[-1] // len(counts)
    last = full * len(counts) + (first[owner] - full * owner)
    tiles: Tiles = np.where(turn < full, turn * len(counts) + owner, last)
    return tiles
