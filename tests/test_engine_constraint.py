"""Constraints bind their own sequence alone; sequences of a lost engine go on in another."""

import numpy as np
import pytest

from fake_backend import GREEDY, FakeBackend, fake_plan, run, tokens_of
from flashformer.engine.engine import Engine
from flashformer.engine.sampling import SamplingParams

PROMPT = [5, 9, 2, 44, 17, 3, 8]
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
RESUMED = (
    GREEDY,
    SAMPLED,
    SamplingParams(
        seed=9, presence_penalty=1, repetition_penalty=1.3, frequency_penalty=1, max_tokens=20
    ),
    SamplingParams(seed=3, n=3, max_tokens=15, logprobs=2, ignore_eos=True),
    SamplingParams(seed=4, min_tokens=9, max_tokens=15, prompt_logprobs=1),
)


class Cycle:
    """Only tokens of a list may follow, in turn; the text is complete after `length` of them."""

    def __init__(self, ids, length):
        self.ids, self.length, self.taken = ids, length, 0

    def allowed(self):
        mask = np.zeros(64, np.bool_)
        mask[self.ids[self.taken % len(self.ids)]] = True
        return mask

    def accept(self, token_id):
        assert token_id in self.ids[self.taken % len(self.ids)]
        self.taken += 1

    @property
    def complete(self):
        return self.taken == self.length


class Broken(Cycle):
    def accept(self, token_id):
        raise ValueError("the grammar lost its way")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_only_allowed_tokens_are_chosen_and_a_complete_text_ends(params):
    engine = Engine(FakeBackend())
    request = engine.add(PROMPT, params, constraints=[Cycle([[7, 8], [9, 10, 11]], 5)])
    deltas = run(engine)
    tokens = tokens_of(deltas, request)
    assert len(tokens) == 5
    assert all(t in ([7, 8], [9, 10, 11])[i % 2] for i, t in enumerate(tokens))
    assert deltas[-1].finish_reason == "stop"


def test_a_failing_constraint_ends_its_own_sequence_alone():
    alone = Engine(FakeBackend())
    wanted = alone.add(PROMPT, SAMPLED)
    expected = tokens_of(run(alone), wanted)
    engine = Engine(FakeBackend())
    victim = engine.add(PROMPT, SAMPLED)
    broken = engine.add(PROMPT, SAMPLED, constraints=[Broken([[3, 4, 5]], 9)])
    empty = engine.add(PROMPT, SAMPLED, constraints=[Cycle([[]], 9)])
    deltas = run(engine)
    assert tokens_of(deltas, victim) == expected
    assert "lost its way" in broken.error
    assert "grammar allows none" in empty.error
    assert broken.finished
    assert empty.finished


def test_an_end_that_the_constraint_demands_comes_before_min_tokens():
    engine = Engine(FakeBackend())
    params = SamplingParams(temperature=0, min_tokens=5, max_tokens=9)
    request = engine.add(PROMPT, params, constraints=[Cycle([[7], [1]], 99)])
    assert tokens_of(run(engine), request) == [7, 1]
    assert request.error is None


@pytest.mark.parametrize("params", RESUMED)
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_sequences_resumed_in_another_engine_go_on_with_the_same_tokens(params, steps):
    whole = Engine(FakeBackend())
    request = whole.add(PROMPT, params)
    deltas = run(whole)
    expected = [tokens_of(deltas, request, i) for i in range(params.n)]

    lost = Engine(FakeBackend())
    request = lost.add(PROMPT, params)
    first = [delta for _ in range(steps) for delta in lost.step()]
    before = [tokens_of(first, request, i) for i in range(params.n)]
    engine = Engine(FakeBackend(fake_plan(max_rows=8)))
    resumed = engine.add(PROMPT, params, resume=before)
    second = run(engine)
    for index in range(params.n):
        assert before[index] + tokens_of(second, resumed, index) == expected[index]
    reasons = {d.index: d.finish_reason for d in (*first, *second) if d.finish_reason}
    assert reasons == {d.index: d.finish_reason for d in deltas if d.finish_reason}


def test_a_constraint_is_resumed_with_its_sequence():
    engine = Engine(FakeBackend())
    request = engine.add(PROMPT, SAMPLED, constraints=[Cycle([[7], [9], [11]], 5)], resume=[[7, 9]])
    assert tokens_of(run(engine), request) == [11, 7, 9]
