"""Log-probabilities of a row of logits: natural logarithm of the softmax of the raw logits.

Raw means before bias, penalties and temperature, so the numbers describe the model, not the
request.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def position_logprobs(
    logits: Float32, token_id: int, num_best: int, decode: Callable[[int], str] | None = None
) -> dict[int, Logprob]:
    """The given token's entry, then those of the `num_best` likeliest tokens; [vocab_size] in.

    Equal logits rank by rising token id, as everywhere.
    """
    values = log_softmax(logits)
    ids = best_ids(logits, num_best)
    ranks = {int(t): rank for rank, t in enumerate(ids, start=1)}
    if token_id not in ranks:
        own = logits[token_id]
        ranks[token_id] = 1 + int(np.sum(logits > own) + np.sum(logits[:token_id] == own))
    ordered = [token_id, *(t for t in ranks if t != token_id)]
    return {t: Logprob(float(values[t]), ranks[t], decode(t) if decode else None) for t in ordered}


def log_softmax(logits: Float32) -> Float32:
    """log(softmax) along the last axis, float32; the sum is taken in float64."""
    top = np.max(logits, axis=-1, keepdims=True)
    shifted = logits - top
    sums = np.sum(np.exp(shifted), axis=-1, keepdims=True, dtype=np.float64)
    result: Float32 = (shifted - np.log(sums)).astype(np.float32)
    return result


def best_ids(logits: Float32, count: int) -> npt.NDArray[np.intp]:
    """The `count` first token ids in the order: falling logit, then rising id."""
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, np.intp)
    bar = np.partition(logits, len(logits) - count)[len(logits) - count]
    above = np.flatnonzero(logits >= bar)
    return above[np.argsort(-logits[above], kind="stable")][:count]
