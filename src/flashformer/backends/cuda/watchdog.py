"""What the kernel leaves behind when a wait lasts too long: who waited for what, as a sentence."""

from flashformer.codegen.cuda_header import MATRICES

WAITS = {  # WaitKind of kernel/cta.cuh
    1: "a slot of the ring to be filled",
    2: "a slot of the ring to be released",
    3: "a copy to land",
    4: "the other CTAs at the end of the token",
    5: "the keys and values of the token before",
    6: "the last copies to land",
    7: "a packet of another CTA",
    8: "the sums of a tile",
    9: "room for the sums of a tile",
}


def describe(word: int, num_layers: int, limit_ns: int) -> str:
    """A wait that timed out, from the watchdog's word (`Cta::report`).

    From the highest bit on: 14 bits, the last number of a matrix minus the one waited at, so that
    the largest word is of the earliest stage; then what for (4), warp (4) and CTA (10).
    """
    matrix, kind, warp, cta = 0x3FFF - (word >> 18), word >> 14 & 15, word >> 10 & 15, word & 1023
    layer, stage = divmod(matrix, len(MATRICES))
    where = "lm_head" if layer == num_layers else f"{MATRICES[stage]} of layer {layer}"
    return (
        f"the CUDA kernel gave up after {limit_ns / 1e9:g} s: warp {warp} of CTA {cta} waited for "
        f"{WAITS.get(kind, kind)}, at {where}; the step was abandoned, please report this"
    )
