"""Tokens drawn on a GPU are those of the numpy meaning, and the engine can end a launch at any."""

import time

import numpy as np
import pytest

from flashformer.backends import open_backend
from flashformer.backends.base import Choice, DecodeRow
from flashformer.engine.engine import Engine
from flashformer.engine.sampler import Draw, TokenCounts, sample
from flashformer.engine.sampling import SamplingParams
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import RandomWeights
from flashformer.plan.plan import PlanOptions
from test_cuda_sampler import choice_of

pytestmark = pytest.mark.gpu

ROWS = 8
POSITION = 0  # without a past, so that all slots are alike


@pytest.fixture(scope="module")
def backend():
    spec = ModelSpec.from_hf({**SHAPES["llama-3.2-1b"], "num_hidden_layers": 2})
    pages = ROWS * 8
    options = PlanOptions("bf16", "bf16", 512, max_batch=ROWS)
    opened = open_backend("cuda", spec, RandomWeights(spec), options, num_pages=pages)
    yield opened
    opened.close()


def page_table():
    return np.arange(ROWS * 8, dtype=np.int32).reshape(ROWS, 8)


def drawn_once(backend, choices, token_ids):
    """One token of every row and the logits that it was drawn from."""
    rows = [
        DecodeRow(int(token_id), POSITION, slot, choice)
        for slot, (token_id, choice) in enumerate(zip(token_ids, choices, strict=True))
    ]
    (tokens,) = backend.launch(rows, page_table(), 1)
    return tokens, backend.logits[: len(rows)].cpu().numpy()


def random_params(rng, vocab_size):
    pick = rng.choice
    return SamplingParams(
        temperature=float(pick([0.3, 0.7, 1.0, 1.5])),
        top_k=int(pick([0, 0, 1, 20, 50, 1000])),
        top_p=float(pick([1.0, 0.95, 0.9, 0.5])),
        min_p=float(pick([0.0, 0.0, 0.05])),
        repetition_penalty=float(pick([1.0, 1.2])),
        presence_penalty=float(pick([0.0, 0.5])),
        logit_bias={int(i): 3.0 for i in rng.integers(0, vocab_size, 9)},
    )


def test_tokens_of_a_large_vocabulary_are_those_of_the_definition(backend):
    """1600 draws of rows of every kind; the few that rounding decides otherwise are counted."""
    rng = np.random.default_rng(0)
    vocab_size = backend.plan.spec.vocab_size
    different = 0
    for trial in range(200):
        kinds = [random_params(rng, vocab_size) for _ in range(ROWS)]
        prompts = [rng.integers(0, vocab_size, 200).tolist() for _ in range(ROWS)]
        choices = [
            choice_of(params, dict.fromkeys(prompt, 0) if params.penalised else {}, trial, row)
            for row, (params, prompt) in enumerate(zip(kinds, prompts, strict=True))
        ]
        tokens, logits = drawn_once(backend, choices, rng.integers(0, vocab_size, ROWS))
        for row, params in enumerate(kinds):
            draw = Draw(trial, POSITION + 1, row)
            expected = sample(logits[row], params, draw, TokenCounts(prompts[row]))
            different += int(tokens[row]) != expected
    # Scores are float32 on the device. The best two are about a unit apart, so they are closer than
    # the rounding of numbers below 64, 4 * 64 * 2^-24, once in 65,000 draws; a cut of top-p, whose
    # masses differ by as little, is met as seldom.
    assert different <= 2


def test_draws_follow_the_softmax(backend):
    """Chi-square over the likeliest tokens and the rest, 4000 draws."""
    params = SamplingParams(temperature=0.25)
    token_ids = np.full(ROWS, 77)
    seen = []
    for first in range(0, 4000, ROWS):
        choices = [choice_of(params, {}, first + row, 0) for row in range(ROWS)]
        tokens, logits = drawn_once(backend, choices, token_ids)
        seen += tokens.tolist()
    scaled = logits[0].astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    likeliest = np.argsort(-weights)[:15]
    expected = np.append(weights[likeliest], 1 - weights[likeliest].sum()) * len(seen)
    found = np.array([seen.count(int(t)) for t in likeliest])
    found = np.append(found, len(seen) - found.sum())
    enough = expected >= 5
    statistic = float(((found - expected)[enough] ** 2 / expected[enough]).sum())
    assert statistic < 45  # 15 degrees of freedom: once in 10,000


class OneToken:
    """A backend that hides that it could draw many tokens."""

    def __init__(self, backend):
        self.plan, self.num_pages, self.step = backend.plan, backend.num_pages, backend.step


def test_the_engine_gives_the_tokens_of_one_token_a_step(backend):
    kinds = [
        SamplingParams(temperature=0, max_tokens=60),
        SamplingParams(seed=1, max_tokens=40, temperature=0.8),
        SamplingParams(seed=2, max_tokens=30, temperature=0.7, top_k=20, top_p=0.9),
        SamplingParams(seed=3, max_tokens=30, repetition_penalty=1.3, frequency_penalty=0.3),
        SamplingParams(seed=4, max_tokens=20, logit_bias={5: 4.0}, min_p=0.05, n=2),
        SamplingParams(seed=5, max_tokens=20, temperature=0, presence_penalty=1.0, logprobs=1),
    ]
    outcomes = []
    for machine in (backend, OneToken(backend)):
        engine = Engine(machine, prefix_reuse=False)
        requests = [engine.add([9, 8 + i, 7], params) for i, params in enumerate(kinds)]
        while engine.has_work:
            engine.step()
        outcomes.append([s.token_ids for request in requests for s in request.sequences])
    assert outcomes[0] == outcomes[1]


def test_rows_do_not_see_their_neighbours_choices(backend):
    choices = [Choice(temperature=1.0, seed=row, top_p=0.9 if row % 2 else 1.0) for row in range(8)]
    token_ids = np.arange(100, 108)
    together, _ = drawn_once(backend, choices, token_ids)
    for row, choice in enumerate(choices):
        alone, _ = drawn_once(backend, [choice], token_ids[row : row + 1])
        assert alone[0] == together[row]


def test_a_token_that_the_host_interrupted_is_drawn_again_the_same():
    """Rows with filters, thirty layers, launches that end at any moment of a token."""
    spec = ModelSpec.from_hf(SHAPES["smollm2-135m"])
    options = PlanOptions("bf16", "bf16", 512, max_batch=ROWS)
    backend = open_backend("cuda", spec, RandomWeights(spec), options, num_pages=ROWS * 8)
    rng = np.random.default_rng(1)
    choices = [Choice(temperature=1.0, seed=s, top_p=(1.0, 0.9)[s % 2]) for s in range(3)]

    def launch(drawn):
        last, position = (drawn[-1], len(drawn)) if len(drawn) else (np.arange(3), 0)
        rows = [DecodeRow(int(last[i]), position, i, choice) for i, choice in enumerate(choices)]
        return backend.launch(rows, page_table(), 300 - len(drawn))

    began = time.perf_counter()
    expected = list(launch([]))
    token_seconds = (time.perf_counter() - began) / 300
    found, launches = [], 0
    while len(found) < 300:
        flight, launches = launch(found), launches + 1
        for _ in range(rng.integers(1, 5)):
            found += [tokens for tokens in [next(flight, None)] if tokens is not None]
        until = time.perf_counter() + rng.random() * token_seconds
        while time.perf_counter() < until:
            pass
        flight.stop()
        found += list(flight)
    backend.close()

    assert np.array_equal(found, expected)
    assert launches > 30


def test_the_host_ends_a_launch_within_two_milliseconds(backend):
    rows = [DecodeRow(5, POSITION, 0, Choice())]
    waits = []
    for _ in range(20):
        launch = backend.launch(rows, page_table(), 256)
        for _ in range(10):
            next(launch)
        launch.stop()
        began = time.perf_counter()
        left = len(list(launch))
        waits.append(time.perf_counter() - began)
        assert left < 40
    assert np.median(waits) < 2e-3


def test_a_launch_ends_for_whoever_has_news_while_the_host_waits(backend):
    launch = backend.launch([DecodeRow(5, POSITION, 0, Choice())], page_table(), 256)
    next(launch)
    launch.unless = lambda: True
    assert len(list(launch)) < 40
