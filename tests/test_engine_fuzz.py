"""Any order of adding, stepping and cancelling: nothing leaks, every sequence ends just once."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fake_backend import FakeBackend, fake_plan, true_logits
from flashformer.engine.engine import Engine
from flashformer.engine.kv_cache import KvCache
from flashformer.engine.sampler import Draw, TokenCounts, sample
from flashformer.engine.sampling import SamplingParams
from flashformer.errors import UsageError

PREFIXES = [list(range(10, 10 + n)) for n in (0, 3, 8, 9, 17)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(max_tokens=3),
    SamplingParams(n=3, seed=5, temperature=2.0, max_tokens=9),
    SamplingParams(temperature=0.7, repetition_penalty=1.5, min_tokens=4, max_tokens=11),
    SamplingParams(prompt_logprobs=1, logprobs=2, max_tokens=2),
    SamplingParams(temperature=0, ignore_eos=True),
]


class EngineMachine(RuleBasedStateMachine):
    """Few pages, small batches, shared prefixes, a poisoned token, a backend that may fail."""

    kind = FakeBackend
    prompt_rows = 0

    def __init__(self):
        super().__init__()
        plan = fake_plan(context=32, max_batch=3, max_rows=8, prompt_rows=self.prompt_rows)
        self.backend = self.kind(plan, num_pages=14, poison={60}, fail_steps=set(range(9, 999, 9)))
        self.engine = Engine(self.backend, seed=3)
        self.requests = []
        self.tokens = {}
        self.finishes = {}

    @rule(
        prefix=st.sampled_from(PREFIXES),
        tail=st.lists(st.integers(0, 61), min_size=1, max_size=9),
        params=st.sampled_from(PARAMS),
    )
    def add(self, prefix, tail, params):
        self.requests.append(self.engine.add([*prefix, *tail], params))

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            try:
                self.note(self.engine.step())
            except RuntimeError:
                continue
            self.engine.kv_cache.check()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(self.requests))
        open_sequences = sum(s.finish_reason is None for s in request.sequences)
        deltas = self.engine.cancel(request)
        assert [d.finish_reason for d in deltas] == ["abort"] * open_sequences
        self.note(deltas)
        assert self.engine.cancel(request) == []
        assert request.finished

    def note(self, deltas):
        for delta in deltas:
            key = (delta.request.number, delta.index)
            assert key not in self.finishes, "news of a sequence that had ended"
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.finishes[key] = delta.finish_reason

    @invariant()
    def pages_add_up(self):
        self.engine.kv_cache.check()

    def teardown(self):
        for _ in range(2000):
            if not self.engine.has_work:
                break
            try:
                self.note(self.engine.step())
            except RuntimeError:
                continue
        assert not self.engine.has_work
        cache = self.engine.kv_cache
        cache.check()
        assert (cache.num_available, cache.num_free_slots) == (14, 3)
        for request in self.requests:
            for sequence in request.sequences:
                self.compare(request, sequence)

    def compare(self, request, sequence):
        key = (request.number, sequence.index)
        reason = self.finishes[key]
        tokens = self.tokens.get(key, [])
        expected, expected_reason = definition(request, sequence.index)
        if reason == "abort":
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, reason) == (expected, expected_reason)


def definition(request, index):
    """Tokens and finish reason by the rules alone."""
    params = request.params
    tokens = list(request.prompt_token_ids)
    counts = TokenCounts(tokens)
    last_chunk_is_poisoned = params.prompt_logprobs is not None and 60 in tokens
    for step in range(request.max_tokens):
        if tokens[-1] == 60 or last_chunk_is_poisoned:
            return tokens[len(request.prompt_token_ids) :], "error"
        forbidden = sorted(request.stop_ids) if step < params.min_tokens else []
        draw = Draw(request.seed, len(tokens), index)
        tokens.append(sample(true_logits(tokens), params, draw, counts, forbidden))
        counts.add(tokens[-1])
        if tokens[-1] in request.stop_ids:
            return tokens[len(request.prompt_token_ids) :], "stop"
    return tokens[len(request.prompt_token_ids) :], "length"


class PromptRowsMachine(EngineMachine):
    """The same where a prompt has rows of its own in a step."""

    prompt_rows = 7


for machine in (EngineMachine, PromptRowsMachine):
    machine.TestCase.settings = settings(
        max_examples=40,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
TestEngineMachine = EngineMachine.TestCase
TestPromptRowsMachine = PromptRowsMachine.TestCase


STEPS = {"queued": 1, "prompt": 2, "first token": 0, "middle": 0, "last token": 0}
TOKENS = {"queued": 0, "prompt": 0, "first token": 1, "middle": 3, "last token": 4}


@pytest.mark.parametrize("stage", sorted(STEPS))
def test_cancelling_at_any_stage_gives_everything_back(stage):
    """40 times a stage beside neighbours: one finish record, no page or slot lost."""
    rng = random.Random(stage)
    plan = fake_plan(context=48, max_batch=2, max_rows=8)
    engine = Engine(FakeBackend(plan))
    free = engine.kv_cache.num_available
    for _ in range(40):
        neighbours = [
            engine.add([rng.randrange(64)] * rng.randrange(1, 9), PARAMS[0])
            for _ in range(2 if stage == "queued" else 1)
        ]
        engine.step()
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        victim = engine.add([rng.randrange(64) for _ in range(21)], params)
        deltas = [d for _ in range(STEPS[stage]) for d in engine.step()]
        while len([d for d in deltas if d.request is victim]) < TOKENS[stage]:
            deltas += engine.step()
        assert not victim.finished
        assert victim.sequences[0].num_computed == {"queued": 0, "prompt": 14}.get(
            stage, 20 + TOKENS[stage]
        )
        records = engine.cancel(victim)
        assert [(d.finish_reason, d.token_ids) for d in records] == [("abort", ())]
        while engine.has_work:
            deltas += engine.step()
        assert all(n.finished for n in neighbours)
        assert sum(d.request is victim and d.finish_reason is not None for d in deltas) == 0
        engine.kv_cache.check()
        assert engine.kv_cache.num_available == free
        assert engine.kv_cache.num_free_slots == 2


def test_thousands_of_short_requests_leave_the_cache_as_it_was():
    engine = Engine(FakeBackend(fake_plan(context=16, max_batch=4, max_rows=8), num_pages=9))
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=1)
    for _ in range(2000):
        try:
            engine.add([rng.randrange(70) for _ in range(rng.randrange(1, 12))], params)
        except UsageError:
            continue
        if rng.random() < 0.5:
            engine.step()
    while engine.has_work:
        engine.step()
    engine.kv_cache.check()
    assert engine.kv_cache.num_available == 9
    assert len(engine.kv_cache._page_of) <= 9


def test_the_longest_unused_prefix_is_given_up_first():
    cache = KvCache(num_pages=4, page_tokens=2, max_batch=2, context=8)

    def use(ids):
        slot, cached = cache.open(ids, len(ids))
        cache.extend(slot, len(ids))
        cache.index(slot, ids, len(ids))
        cache.close(slot)
        cache.check()
        return cached

    old, new = [1, 2, 3, 4, 5], [6, 7, 8]
    assert use(old) == 0  # three pages, two of them full
    assert use(new) == 0
    assert use(old) == 4  # used again: now the younger one
    assert use([11, 12, 13, 14]) == 0  # needs two pages: a free one and the oldest idle one
    assert use(old) == 4
    assert use(new) == 0


def test_pages_in_use_are_never_given_up():
    cache = KvCache(num_pages=3, page_tokens=2, max_batch=3, context=6)
    slot, _ = cache.open([1, 2, 3], 4)
    cache.extend(slot, 3)
    cache.index(slot, [1, 2, 3], 2)
    assert cache.open([5, 6, 7], 4) is None  # one page is left, two are needed
    sharing = cache.open([1, 2, 9], 4)
    assert sharing is not None
    assert sharing[1] == 2
    cache.check()
    assert cache.page_table[sharing[0], 0] == cache.page_table[slot, 0]
    cache.extend(sharing[0], 4)
    assert cache.num_available == 0
    cache.close(slot)
    cache.close(sharing[0])
    cache.check()
    assert cache.num_available == 3


def test_hashes_are_chained_so_that_equal_pages_behind_other_prefixes_differ():
    cache = KvCache(num_pages=8, page_tokens=2, max_batch=2, context=8)
    slot, _ = cache.open([1, 2, 3, 4, 5], 5)
    cache.extend(slot, 5)
    cache.index(slot, [1, 2, 3, 4, 5], 4)
    cache.close(slot)
    assert cache.open([9, 9, 3, 4, 5], 5)[1] == 0
    assert cache.open([1, 2, 3, 4, 5], 5)[1] == 4
    assert (cache.page_table >= 0).sum() == 2


def test_forgetting_drops_what_nobody_uses():
    cache = KvCache(num_pages=4, page_tokens=2, max_batch=2, context=8)
    slot, _ = cache.open([1, 2, 3], 3)
    cache.extend(slot, 3)
    cache.index(slot, [1, 2, 3], 2)
    cache.close(slot)
    cache.forget()
    cache.check()
    assert cache.open([1, 2, 3], 3)[1] == 0
    assert np.array_equal(cache.page_table[0], [-1] * 4)
