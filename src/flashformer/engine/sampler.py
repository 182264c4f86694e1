"""How a token is chosen from a row of logits: the numpy meaning of every device sampler.

The order is: logit_bias, allowed_token_ids, forbidden ids and a constraint; repetition, frequency
and presence penalty; temperature; top_k; top_p; min_p; the draw. Tokens are ordered by falling
logit, equal logits by rising id: this total order decides every tie.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashformer.engine.philox import philox4x32
from flashformer.engine.sampling import SamplingParams

Float32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

_BUCKETS = 2048
_CHUNK = 8192  # Philox blocks at once: its arrays stay in the second-level cache
_NEAR = np.float32(-8.0)
_DEEPEST = -32.0  # scaled logits below this share the last bucket
# A uniform is (x + 1/2) / 2^32, so -log(-log1p(-u)) lies in (-3.14, 22.88): a token this far below
# the largest scaled logit cannot win against it.
_HOPELESS = np.float32(-26.03)


@dataclass(frozen=True, slots=True)
class Draw:
    """Which random numbers a choice uses: equal draws choose equally from equal logits."""

    seed: int  # 64 bits
    position: int  # of the token to be chosen, counted from the prompt's first token
    index: int = 0  # which of the request's n sequences


class TokenCounts:
    """The tokens of one sequence, counted for the penalties."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self._place: dict[int, int] = {}
        for token_id in prompt_token_ids:
            self._place.setdefault(token_id, len(self._place))
        self._ids: Ids = np.fromiter(self._place, np.intp, len(self._place))
        self._generated = np.zeros(len(self._place), np.float32)

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            room = max(64, len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(room, np.intp)])
            self._generated = np.concatenate([self._generated, np.zeros(room, np.float32)])
        self._ids[place] = token_id
        self._generated[place] += 1

    def as_dict(self) -> dict[int, int]:
        """How often each of its tokens was generated; 0: only given."""
        counted = self._generated[: len(self._place)].astype(int).tolist()
        return dict(zip(self._place, counted, strict=True))

    def penalise(self, logits: Float32, params: SamplingParams) -> None:
        """Change `logits` in place: repetition by prompt and output, the others by the output."""
        ids, generated = self._ids[: len(self._place)], self._generated[: len(self._place)]
        values = logits[ids]
        penalty = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * generated
        values -= np.float32(params.presence_penalty) * (generated > 0)
        logits[ids] = values


def sample(
    logits: Float32,
    params: SamplingParams,
    draw: Draw,
    counts: TokenCounts | None = None,
    forbidden: Iterable[int] = (),
    allowed: Mask | None = None,
) -> int:
    """The token chosen from `logits` [vocab_size]; -1 if they hold a NaN or no finite maximum.

    `counts` is needed if `params.penalised`; `forbidden` ids are never chosen; `allowed`
    [vocab_size] are all that may be (None: all).
    """
    logits = adjust(logits, params, counts, forbidden, allowed)
    best = int(np.argmax(logits))  # numpy returns the first NaN's place, if there is one
    if not np.isfinite(logits[best]):
        return -1
    if params.greedy:
        return best
    scaled = logits - logits[best]
    scaled /= np.float32(params.temperature)
    token_ids = candidates(scaled, params)
    return int(token_ids[gumbel_argmax(scaled[token_ids], token_ids, draw)])


def adjust(
    logits: Float32,
    params: SamplingParams,
    counts: TokenCounts | None = None,
    forbidden: Iterable[int] = (),
    allowed: Mask | None = None,
) -> Float32:
    """Logits after bias, masks and penalties; the same array if nothing changes it."""
    forbidden = list(forbidden)
    if not params.adjusting and not forbidden and allowed is None:
        return logits
    logits = logits.copy()
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias, np.intp)
        logits[ids] += np.fromiter(params.logit_bias.values(), np.float32)
    if params.allowed_token_ids is not None:
        masked = np.full_like(logits, -np.inf)
        ids = np.asarray(params.allowed_token_ids)
        masked[ids] = logits[ids]
        logits = masked
    logits[forbidden] = -np.inf
    if allowed is not None:
        logits[~allowed] = -np.inf
    if params.penalised and counts is not None:
        counts.penalise(logits, params)
    return logits


def candidates(scaled: Float32, params: SamplingParams) -> Ids:
    """The tokens that survive top_k, top_p and min_p, ascending; `scaled` has maximum 0.

    top_k keeps the first k of the order; top_p keeps the shortest head of the order whose
    probability, among what top_k kept, reaches top_p; min_p keeps tokens at least min_p as likely
    as the likeliest. Tokens too far below the maximum to win any draw are left out as well.
    """
    kept: Ids | None = None  # None: all
    if 0 < params.top_k < len(scaled):
        kept = _head(scaled, None, params.top_k)
    if params.top_p < 1.0:
        left = scaled if kept is None else scaled[kept]
        weights = np.exp(left)
        places = _head(left, weights, params.top_p * float(np.sum(weights, dtype=np.float64)))
        kept = places if kept is None else kept[places]
    floor = _HOPELESS
    if params.min_p > 0.0:
        floor = max(floor, np.float32(np.log(params.min_p)))
    return np.flatnonzero(scaled >= floor) if kept is None else kept[scaled[kept] >= floor]


def gumbel_argmax(scaled: Float32, token_ids: Ids, draw: Draw) -> int:
    """The place of the token that wins the Gumbel-max race: a draw from softmax(scaled), maximum 0.

    Token t reads word t % 4 of the Philox block with counter (t // 4, position, index, 0) and key
    `seed`; u = (word + 1/2) / 2^32 and the score is scaled - log(-log1p(-u)) in float64. Every
    token's score stands alone, so a device may compute them in any order. Ties fall to the lowest
    id.
    """
    words = _words(token_ids, draw)
    weights = np.exp(scaled)
    # u < -log1p(-u), so a token whose u / weight exceeds another's -log1p(-u) / weight has lost to
    # it; float32 is enough for this test, its rounding is covered by the margin.
    ratios = (words.astype(np.float32) + np.float32(0.5)) / weights
    first = int(np.argmin(ratios))
    bound = _exponential(words[first]) / np.float64(weights[first])
    close = np.flatnonzero(ratios <= np.float32(bound * 2.0**32 * (1 + 1e-4)))
    scores = scaled[close].astype(np.float64) - np.log(_exponential(words[close]))
    return int(close[np.argmax(scores)])


def _exponential(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """A draw from the exponential distribution for each 32-bit word, in float64."""
    return np.asarray(-np.log1p((words.astype(np.float64) + 0.5) * -(2.0**-32)))


def _words(token_ids: Ids, draw: Draw) -> npt.NDArray[np.uint32]:
    """The random word of each of the ascending token ids."""
    blocks = token_ids >> 2
    start = int(blocks[0])
    dense = int(blocks[-1]) - start < len(blocks)  # cheaper to compute every block once
    if dense:
        blocks = np.arange(start, int(blocks[-1]) + 1)
    words = np.empty((len(blocks), 4), np.uint32)
    for first in range(0, len(blocks), _CHUNK):
        part = slice(first, first + _CHUNK)
        counter = (blocks[part], draw.position, draw.index, 0)
        for column, word in enumerate(philox4x32(counter, draw.seed)):
            words[part, column] = word
    if dense:
        return np.take(words, token_ids - 4 * start)
    return np.take(words, np.arange(len(blocks)) * 4 + (token_ids & 3))


def _head(scaled: Float32, weights: Float32 | None, limit: float) -> Ids:
    """Places of the shortest head of the order whose weights (None: 1 each) reach `limit`.

    They are ascending. A histogram finds the bucket in which the head ends; only that bucket is
    sorted.
    """
    near = np.flatnonzero(scaled >= _NEAR)
    if len(near) <= len(scaled) // 2:  # a short list, if the head is sure to end inside it
        inner = None if weights is None else weights[near]
        reach = len(near) if inner is None else float(np.sum(inner, dtype=np.float64))
        if reach >= limit:
            return near[_head(scaled[near], inner, limit)]
    depth = min(-float(scaled.min()), -_DEEPEST)  # masked tokens fall into the last bucket
    scale = np.float32((_BUCKETS - 1) / depth if depth > 1e-6 else 0.0)
    bucket = np.minimum(scaled * -scale, np.float32(_BUCKETS - 1)).astype(np.intp)
    sums = np.cumsum(np.bincount(bucket, weights, _BUCKETS))
    last = int(np.searchsorted(sums, limit))
    last = min(last, _BUCKETS - 1)  # rounding may leave the limit above the sum of everything
    inside = np.flatnonzero(bucket == last)
    inside = inside[np.argsort(-scaled[inside], kind="stable")]
    own = np.ones(len(inside)) if weights is None else weights[inside].astype(np.float64)
    before = np.cumsum(own) - own + (sums[last - 1] if last else 0)
    kept = bucket < last
    kept[inside[before < limit]] = True
    return np.flatnonzero(kept)
