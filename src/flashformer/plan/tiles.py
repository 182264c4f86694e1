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


def late_tiles(num_tiles: int, num_ctas: int) -> int:
    """How many of its tiles a CTA takes from the matrix's end, and last; 0 where it has too few.

    Two, so that no sector of 32 bytes of what gate_up sends belongs to two CTAs.
    """
    return 2 if num_tiles // num_ctas >= 4 else 0


def stored_tiles(first_tile: tuple[int, ...], late: int) -> Tiles:
    """Which tile, by rows, lies at every place of the image.

    Every CTA has neighbouring places (`first_tile`). Its last `late` ones hold its share of the
    matrix's last tiles, all others its share of the tiles before.
    """
    first = np.array(first_tile)
    counts = np.diff(first)
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(first[-1])
    from_end = place - first[owner + 1]  # -1: the owner's last
    last = first[-1] - late * (len(counts) - 1 - owner) + from_end
    tiles: Tiles = np.where(from_end < -late, place - late * owner, last)
    return tiles
