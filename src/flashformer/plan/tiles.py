"""Who gets which tiles: a contiguous split of a matrix over the CTAs, balanced by bytes."""


def split_tiles(num_tiles: int, num_ctas: int, *, shifted: bool = False) -> tuple[int, ...]:
    """First tile of every CTA, and the end: [num_ctas + 1].

    The tiles of a matrix have equal bytes, so equal counts are equal bytes: no CTA has more than
    one tile more than another. The larger shares are spread evenly over the CTAs; `shifted` gives
    them to other CTAs, as far as possible.
    """
    shift = num_ctas // 2 if shifted else 0
    return tuple((cta * num_tiles + shift) // num_ctas for cta in range(num_ctas + 1))
