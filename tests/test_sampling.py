"""The sampler: its random numbers, the distribution of its choices, its ties and its parameters."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from flashformer.engine.logprobs import best_ids, log_softmax, position_logprobs
from flashformer.engine.philox import philox4x32
from flashformer.engine.sampler import Draw, TokenCounts, adjust, candidates, sample
from flashformer.engine.sampling import SamplingParams, check_vocabulary
from flashformer.errors import ParameterError, UsageError

GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


def test_philox_of_an_array_is_philox_of_each_element():
    counters = np.array([0, 1, 77, 2**32 - 1])
    together = philox4x32((counters, 5, 6, 7), 99)
    for i, counter in enumerate(counters):
        alone = philox4x32((int(counter), 5, 6, 7), 99)
        assert [int(word[i]) for word in together] == [int(word) for word in alone]


def exact_distribution(logits, params):
    """The probabilities by the definition, with a full sort in float64."""
    scaled = (logits - logits.max()).astype(np.float64) / params.temperature
    order = np.lexsort((np.arange(len(logits)), -scaled))
    kept = order[: params.top_k] if params.top_k else order
    weights = np.exp(scaled[kept])
    before = np.cumsum(weights) - weights
    if params.top_p < 1:
        kept = kept[before < params.top_p * weights.sum()]
    kept = kept[np.exp(scaled[kept]) >= params.min_p]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = np.exp(scaled[kept])
    return probabilities / probabilities.sum()


CASES = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0.5, 1.6), (0, 1, 7, 20), (1.0, 0.9, 0.35), (0.0, 0.1))
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_choices_follow_the_exact_distribution(case):
    """Chi-square over 700 draws; p > 1e-3 with fixed seeds."""
    params = SamplingParams(**CASES[case])
    logits = (np.random.default_rng(case).standard_normal(24) * 2).astype(np.float32)
    logits[3] = logits[9]  # a tie
    exact = exact_distribution(logits, params)
    draws = 700
    found = np.zeros(len(logits))
    for position in range(draws):
        found[sample(logits, params, Draw(case, position))] += 1
    assert found[exact == 0].sum() == 0
    assert chi_square_p(found, exact * draws) > 1e-3


def chi_square_p(found, expected):
    """p value of Pearson's test by Wilson and Hilferty's approximation; rare cells pooled."""
    order = np.argsort(expected)
    rare = order[np.cumsum(expected[order]) < 8]
    common = np.setdiff1d(np.flatnonzero(expected), rare)
    cells = [(found[i], expected[i]) for i in common]
    if expected[rare].sum() > 0:
        cells.append((found[rare].sum(), max(expected[rare].sum(), 1e-9)))
    freedom = len(cells) - 1
    if freedom == 0:
        return 1.0
    statistic = sum((f - e) ** 2 / e for f, e in cells)
    z = (statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2 * 2 / (9 * freedom)))


def test_the_draws_of_positions_indices_and_seeds_are_independent():
    """Chi-square of pairs of draws from two equal tokens against four equal cells."""
    logits = np.zeros(2, np.float32)
    params = SamplingParams()
    for other in (
        lambda p: Draw(1, p + 1),
        lambda p: Draw(1, p, 1),
        lambda p: Draw(2, p),
        lambda p: Draw(1 + 2**32, p),
    ):
        cells = np.zeros(4)
        for p in range(1000):
            a, b = sample(logits, params, Draw(1, p)), sample(logits, params, other(p))
            cells[2 * a + b] += 1
        assert chi_square_p(cells, np.full(4, 250.0)) > 1e-3


def test_a_large_vocabulary_is_drawn_as_the_definition_says():
    """The shortcuts (buckets, pruning, shared Philox blocks) change no choice."""
    rng = np.random.default_rng(3)
    for trial in range(60):
        size = int(rng.integers(1, 5000))
        logits = (rng.standard_normal(size) * rng.choice([0, 0.1, 2, 12, 60])).astype(np.float32)
        if trial % 3 == 0:
            logits = np.round(logits)  # many ties
        params = SamplingParams(
            temperature=float(rng.choice([0.05, 0.7, 1.0, 30.0])),
            top_k=int(rng.choice([0, 1, 5, 100])),
            top_p=float(rng.choice([1.0, 0.999999, 0.9, 0.01])),
            min_p=float(rng.choice([0.0, 0.02, 1.0])),
        )
        draw = Draw(int(rng.integers(2**63)), trial)
        scaled = (logits - logits.max()) / np.float32(params.temperature)
        kept = np.flatnonzero(kept_by_sorting(scaled, params))
        words = philox4x32((np.arange(-(-size // 4)), draw.position, 0, 0), draw.seed)
        uniforms = (np.stack(words, -1).reshape(-1)[:size].astype(np.float64) + 0.5) / 2**32
        scores = scaled.astype(np.float64) - np.log(-np.log1p(-uniforms))
        assert sample(logits, params, draw) == kept[np.argmax(scores[kept])]


def kept_by_sorting(scaled, params):
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        weights = np.exp(scaled[order]).astype(np.float64)
        before = np.cumsum(weights) - weights
        order = order[before < params.top_p * weights.sum()]
    kept = np.zeros(len(scaled), bool)
    kept[order] = True
    kept &= scaled >= -26.03  # no draw lets a token win that is further below the maximum
    if params.min_p:
        kept &= scaled >= np.float32(np.log(params.min_p))
    return kept


def test_candidates_are_what_a_full_sort_keeps():
    rng = np.random.default_rng(8)
    for _ in range(200):
        size = int(rng.integers(1, 400))
        scaled = (rng.standard_normal(size) * rng.choice([0, 1e-7, 1, 5])).astype(np.float32)
        scaled -= scaled.max()
        params = SamplingParams(
            top_k=int(rng.integers(0, size + 3)), top_p=float(rng.choice([1, 0.9, 0.5, 1e-6]))
        )
        kept = np.flatnonzero(kept_by_sorting(scaled, params))
        np.testing.assert_array_equal(candidates(scaled, params), kept)


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = np.array([1, 5, 5, 0], np.float32)
    assert sample(logits, GREEDY, Draw(0, 0)) == 1
    assert sample(logits, SamplingParams(temperature=0.0009), Draw(0, 0)) == 1
    assert {sample(logits, SamplingParams(top_k=1), Draw(0, p)) for p in range(50)} == {1}


def test_top_k_keeps_exactly_k_tokens_and_the_lowest_ids_of_a_tie():
    logits = np.array([2, 3, 2, 2, 2], np.float32)
    params = SamplingParams(top_k=3)
    np.testing.assert_array_equal(candidates(logits - 3, params), [0, 1, 2])


def test_top_p_keeps_the_shortest_head_that_reaches_it():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for top_p, expected in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.9, 4)):
        kept = candidates(logits - logits.max(), SamplingParams(top_p=top_p - 1e-6))
        assert len(kept) == expected


def test_the_choice_does_not_depend_on_other_tokens_that_cannot_win():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(500).astype(np.float32)
    wider = np.concatenate([logits, np.full(300, -80, np.float32)])
    params = SamplingParams()
    for position in range(100):
        draw = Draw(5, position)
        assert sample(logits, params, draw) == sample(wider, params, draw)


def test_a_row_without_a_finite_maximum_gives_no_token():
    for bad in (np.nan, np.inf):
        logits = np.zeros(8, np.float32)
        logits[5] = bad
        assert sample(logits, SamplingParams(), Draw(0, 0)) == -1
        assert sample(logits, GREEDY, Draw(0, 0)) == -1
    assert sample(np.full(8, -np.inf, np.float32), SamplingParams(), Draw(0, 0)) == -1


def test_penalties_follow_their_formulas():
    logits = np.array([2.0, -2.0, 1.0, 1.0, 0.5], np.float32)
    counts = TokenCounts([0, 1])
    for token_id in (2, 2, 3):
        counts.add(token_id)
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    expected = [1.0, -4.0, 0.5 - 0.5 - 0.5, 0.5 - 0.25 - 0.5, 0.5]
    np.testing.assert_allclose(adjust(logits, params, counts), expected, rtol=1e-6)
    np.testing.assert_array_equal(logits[0], 2.0)  # the row itself is untouched


def test_counts_grow_with_the_text():
    counts = TokenCounts([])
    logits = np.zeros(1000, np.float32)
    for token_id in [*range(1000), *range(500)]:
        counts.add(token_id)
    counts.penalise(logits, SamplingParams(frequency_penalty=1.0))
    np.testing.assert_array_equal(logits, [-2.0] * 500 + [-1.0] * 500)


def test_bias_masks_and_forbidden_ids_decide_the_choice():
    logits = np.array([3, 2, 1, 0], np.float32)
    draw = Draw(0, 0)
    assert sample(logits, dataclasses.replace(GREEDY, logit_bias={2: 5}), draw) == 2
    assert sample(logits, dataclasses.replace(GREEDY, allowed_token_ids=[1, 3]), draw) == 1
    assert sample(logits, GREEDY, draw, forbidden=[0, 1]) == 2


def test_log_softmax_matches_float64_within_float32_rounding():
    logits = (np.random.default_rng(0).standard_normal((3, 5000)) * 8).astype(np.float32)
    wide = logits.astype(np.float64)
    exact = wide - wide.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    assert np.abs(log_softmax(logits) - exact).max() < 4e-6  # 2 ulp of values up to 64 - e


def test_ranks_count_equal_logits_by_id():
    logits = np.array([1, 3, 3, 2, 1], np.float32)
    np.testing.assert_array_equal(best_ids(logits, 4), [1, 2, 3, 0])
    entries = position_logprobs(logits, 4, 2)
    assert {t: e.rank for t, e in entries.items()} == {4: 5, 1: 1, 2: 2}
    assert list(position_logprobs(logits, 2, 0)) == [2]


GOOD = {
    "n": [1, 8, np.int64(3)],
    "temperature": [0, 0.7, 100, np.float32(0.5)],
    "top_p": [1, 0.1],
    "top_k": [0, -1, 50],
    "min_p": [0, 1],
    "presence_penalty": [-2, 2],
    "repetition_penalty": [0.01, 10],
    "seed": [0, 2**64 - 1],
    "stop": ["a", ["a", "b"], (), "é" * 128],
    "stop_token_ids": [[], [1, 2]],
    "logit_bias": [{}, {1: 2.0}, {"7": -100}],
    "allowed_token_ids": [[1]],
    "max_tokens": [1, 2**31 - 1, None],
    "min_tokens": [0, 5],
    "logprobs": [0, 20, None],
    "prompt_logprobs": [0, 20],
    "max_new_tokens": [3],
    "do_sample": [True, False],
}
WRONG = ["x", [], {}, b"1", object(), True, math.nan, 1e400, -(10**30), 10**30, 1.5, "\ud800"]
BAD = {
    "n": [*WRONG, 0, -1, 9, 10**9, 2**63, "8", 1.0, None],
    "temperature": ["1", [], True, math.nan, math.inf, -0.1, 101, None, 10**400],
    "top_p": ["1", True, 0, -1, 1.01, math.nan, None],
    "top_k": ["1", True, -2, 2.0, None],
    "min_p": [-0.1, 1.1, math.nan, "0"],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, "x"],
    "repetition_penalty": [0, -1, 10.5, math.inf],
    "seed": [-1, 2**64, 1.0, "1", True],
    "stop": [5, [5], [""], "", ["a"] * 17, "a" * 257, {"a": 1}, b"a"],
    "stop_token_ids": ["12", [-1], [1.0], [True], 5, [1] * 129, {1: 2}, [2**40]],
    "logit_bias": [[1], {-1: 1}, {"x": 1}, {1: 101}, {1: math.nan}, {1: "1"}, {1.0: 1}, "a"],
    "allowed_token_ids": [[], [-1], "ab"],
    "max_tokens": [*WRONG, 0, -1, "5"],
    "min_tokens": [-1, 1.0, None, True],
    "logprobs": [-1, 21, True, "1"],
    "prompt_logprobs": [-1, 21, 1.0],
    "ignore_eos": [1, "yes", None],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": ["true"],
    "max_new_tokens": [0, "1"],
    "do_sample": [1, "no"],
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_good_values_are_taken(name):
    for value in GOOD[name]:
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_values_are_refused_with_one_short_sentence_that_names_the_parameter(name):
    for value in BAD[name]:
        with pytest.raises(UsageError) as caught:
            SamplingParams(**{name: value})
        sentence = str(caught.value)
        assert isinstance(caught.value, ParameterError)
        assert name in sentence or caught.value.parameter in sentence
        assert len(sentence) < 200
        assert "\n" not in sentence


def test_values_are_stored_in_one_form():
    params = SamplingParams(
        temperature=1, top_k=-1, stop="end", logit_bias={"5": 1}, allowed_token_ids=[4, 2, 4]
    )
    assert params.temperature == 1.0
    assert isinstance(params.temperature, float)
    assert (params.top_k, params.stop, params.logit_bias) == (0, ("end",), {5: 1.0})
    assert params.allowed_token_ids == (2, 4)
    assert SamplingParams(max_new_tokens=7).max_tokens == 7
    assert SamplingParams(do_sample=False).greedy
    assert dataclasses.replace(SamplingParams(max_new_tokens=7), seed=1).max_tokens == 7


def test_two_names_of_one_parameter_must_agree():
    SamplingParams(max_tokens=3, max_new_tokens=3)
    with pytest.raises(ParameterError, match="one parameter"):
        SamplingParams(max_tokens=3, max_new_tokens=4)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(ParameterError, match="5 > 4"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_token_ids_are_compared_with_the_model():
    check_vocabulary(SamplingParams(stop_token_ids=[9]), 10)
    with pytest.raises(ParameterError, match=r"token id 10, .* ends at 9"):
        check_vocabulary(SamplingParams(stop_token_ids=[10]), 10)
