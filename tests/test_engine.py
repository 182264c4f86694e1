"""The engine over the fake backend: every token must be what the sequence alone implies."""

import math
import random

import pytest

from fake_backend import GREEDY, FakeBackend, expected_tokens, fake_plan, run, tokens_of
from flashformer.engine.engine import Engine
from flashformer.engine.sampling import SamplingParams

HOSTILE = (
    SamplingParams(
        presence_penalty=2, frequency_penalty=-2, repetition_penalty=3, max_tokens=20, seed=1
    ),
    SamplingParams(logit_bias={3: 100.0, 4: -100.0}, max_tokens=20, logprobs=20),
    SamplingParams(n=3, temperature=2.0, max_tokens=7, ignore_eos=True),
    SamplingParams(allowed_token_ids=[5, 6], min_tokens=5, max_tokens=9),
    SamplingParams(top_k=2, top_p=0.3, min_p=0.5, stop_token_ids=[8], max_tokens=20),
    SamplingParams(temperature=100.0, prompt_logprobs=3, max_tokens=15),
    SamplingParams(max_tokens=1),
)


def test_greedy_tokens_are_those_of_the_sequence_alone():
    engine = Engine(FakeBackend())
    prompt = [5, 9, 2, 44, 17, 3, 8]
    request = engine.add(prompt, GREEDY)
    assert tokens_of(run(engine), request) == expected_tokens(prompt, GREEDY, 0, 8)


@pytest.mark.parametrize("max_rows", [8, 9, 16, 64])
def test_a_prompt_read_in_chunks_of_any_size_gives_the_same_tokens(max_rows):
    engine = Engine(FakeBackend(fake_plan(max_rows=max_rows)))
    prompt = [random.Random(1).randrange(64) for _ in range(41)]
    request = engine.add(prompt, GREEDY)
    assert tokens_of(run(engine), request) == expected_tokens(prompt, GREEDY, 0, 8)


def test_a_prompt_with_rows_of_its_own_has_the_same_chunks_beside_neighbours():
    prompt = [random.Random(1).randrange(64) for _ in range(41)]
    chunks = []
    for neighbours in (0, 5):
        backend = FakeBackend(fake_plan(max_rows=8, prompt_rows=16))
        engine = Engine(backend)
        for first in range(neighbours):
            engine.add([first], GREEDY)
            engine.step()
        request = engine.add(prompt, SamplingParams(temperature=0, max_tokens=2))
        assert len(tokens_of(run(engine), request)) == 2
        own = [[p for slot, p in rows if slot == neighbours] for rows in backend.batches]
        chunks.append([(part[0], len(part)) for part in own if part])
    assert chunks[0] == chunks[1] == [(0, 16), (16, 16), (32, 9), (41, 1)]


def test_many_random_requests_each_get_their_own_tokens():
    rng = random.Random(5)
    engine = Engine(FakeBackend(), seed=11)
    wanted = []
    for number in range(40):
        prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 30))]
        params = rng.choice(HOSTILE)
        wanted.append((engine.add(prompt, params), prompt, params, 11 + number))
    deltas = run(engine)
    for request, prompt, params, seed in wanted:
        seed = seed if params.seed is None else params.seed
        for index in range(params.n):
            expected = expected_tokens(prompt, params, seed, request.max_tokens, index)
            assert tokens_of(deltas, request, index) == expected
        assert request.finished


def test_a_victim_is_bit_identical_alone_and_beside_seven_hostile_neighbours():
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=3, logprobs=20, max_tokens=20)
    prompt = [7, 7, 9, 30, 31, 2]

    def victim(with_neighbours, trial):
        rng = random.Random(trial)
        backend = FakeBackend(poison={60})
        engine = Engine(backend)
        if with_neighbours:
            for neighbour in rng.sample(HOSTILE, 5):
                engine.add([rng.randrange(60) for _ in range(rng.randrange(1, 20))], neighbour)
            engine.add([1, 2, 60], GREEDY)  # its logits hold a NaN
            doomed = engine.add([4, 5], SamplingParams(ignore_eos=True))
        for _ in range(rng.randrange(4)):
            engine.step()
        request = engine.add(prompt, params)
        deltas, step = [], 0
        while not request.finished:
            deltas += engine.step()
            step += 1
            if with_neighbours and step == 3:
                engine.cancel(doomed)
        own = [d for d in deltas if d.request is request]
        return tokens_of(own, request), [d.logprobs for d in own]

    alone = victim(False, 0)
    assert len(alone[0]) > 5
    for trial in range(40):
        assert victim(True, trial) == alone


def test_decoding_neighbours_go_on_while_a_long_prompt_is_read():
    backend = FakeBackend(fake_plan(max_rows=8))
    engine = Engine(backend)
    first = engine.add([5], SamplingParams(temperature=0, ignore_eos=True, max_tokens=30))
    for _ in range(3):
        engine.step()
    engine.add(list(range(2, 42)), GREEDY)
    for _ in range(5):
        assert engine.step()[0].request is first
    assert all(len(rows) <= 8 for rows in backend.batches)
    assert any(len(rows) == 8 for rows in backend.batches)


def test_requests_start_in_the_order_of_arrival():
    engine = Engine(FakeBackend(fake_plan(max_batch=2)))
    requests = [engine.add([3, 4, i], GREEDY) for i in range(7)]
    deltas = run(engine)
    first_seen = list(dict.fromkeys(d.request.number for d in deltas))
    assert first_seen == [r.number for r in requests]


def test_every_sequence_has_exactly_one_finish_record_and_it_is_its_last():
    engine = Engine(FakeBackend())
    requests = [engine.add([i + 2, 3], params) for i, params in enumerate(HOSTILE)]
    deltas = run(engine)
    for request in requests:
        for index in range(request.params.n):
            own = [d for d in deltas if d.request is request and d.index == index]
            assert [d.finish_reason is not None for d in own] == [False] * (len(own) - 1) + [True]


def test_equal_prompts_share_pages_and_the_logits_are_bit_equal():
    backend = FakeBackend()
    engine = Engine(backend)
    prompt = [9, 8, 7, 6, 5, 4, 3, 2, 11]
    params = SamplingParams(temperature=0, logprobs=20, max_tokens=10, ignore_eos=True)
    first = engine.add(prompt, params)
    a = [(d.token_ids, d.logprobs) for d in run(engine)]
    second = engine.add(prompt, params)
    b = [(d.token_ids, d.logprobs) for d in run(engine)]
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert a == b


def test_the_whole_prompt_is_never_taken_from_the_cache():
    engine = Engine(FakeBackend())
    prompt = [9, 8, 7, 6, 5, 4, 3, 2]  # two full pages
    engine.add(prompt, GREEDY)
    run(engine)
    again = engine.add(prompt, GREEDY)
    assert tokens_of(run(engine), again) == expected_tokens(prompt, GREEDY, 0, 8)
    assert again.cached_tokens == 4


def test_a_conversation_reuses_the_tokens_it_generated():
    engine = Engine(FakeBackend())
    prompt = [9, 8, 7, 6]
    first = engine.add(prompt, GREEDY)
    answer = tokens_of(run(engine), first)
    longer = engine.add([*prompt, *answer, 12, 13], GREEDY)
    run(engine)
    assert longer.cached_tokens == 8  # of 4 + 8 + 2; the last generated token was never stored


def test_a_prefix_that_differs_in_its_first_token_is_not_reused():
    engine = Engine(FakeBackend())
    engine.add([9, 8, 7, 6, 5, 4, 3, 2, 1], GREEDY)
    run(engine)
    other = engine.add([10, 8, 7, 6, 5, 4, 3, 2, 1], GREEDY)
    run(engine)
    assert other.cached_tokens == 0


def test_n_sequences_share_the_prompt_and_differ_by_their_index():
    engine = Engine(FakeBackend())
    prompt = [9, 8, 7, 6, 5, 4, 3, 2, 11]
    params = SamplingParams(n=4, temperature=1.5, max_tokens=10, seed=4, ignore_eos=True)
    request = engine.add(prompt, params)
    deltas = run(engine)
    texts = {tuple(tokens_of(deltas, request, i)) for i in range(4)}
    assert len(texts) == 4
    assert [s.cached_tokens for s in request.sequences] == [0, 8, 8, 8]


def test_the_same_seed_gives_the_same_tokens_and_other_seeds_others():
    def tokens(seed, engine_seed=0):
        engine = Engine(FakeBackend(), seed=engine_seed)
        request = engine.add([3, 4, 5], SamplingParams(seed=seed, max_tokens=12, ignore_eos=True))
        return tokens_of(run(engine), request)

    assert tokens(8) == tokens(8, engine_seed=5)
    assert tokens(8) != tokens(9)
    assert tokens(None, 3) == tokens(None, 3) == tokens(3)
    assert tokens(None, 3) != tokens(None, 4)


def test_requests_without_a_seed_get_different_tokens_from_one_engine():
    engine = Engine(FakeBackend())
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    requests = [engine.add([3, 4, 5], params) for _ in range(3)]
    deltas = run(engine)
    assert len({tuple(tokens_of(deltas, r)) for r in requests}) == 3


def test_an_end_token_ends_the_sequence_and_stays_in_its_tokens():
    engine = Engine(FakeBackend(script={2: 20, 3: 1}))
    request = engine.add([3, 4, 5], SamplingParams(temperature=0, max_tokens=9))
    deltas = run(engine)
    assert tokens_of(deltas, request) == [20, 1]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)


def test_a_stop_token_id_ends_the_sequence_and_is_named():
    engine = Engine(FakeBackend(script={2: 20, 3: 33}))
    params = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=[33], ignore_eos=True)
    request = engine.add([3, 4, 5], params)
    deltas = run(engine)
    assert tokens_of(deltas, request) == [20, 33]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", 33)


def test_ignore_eos_goes_on_behind_the_end_token():
    engine = Engine(FakeBackend(script={2: 1}))
    request = engine.add([3, 4, 5], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    deltas = run(engine)
    assert len(tokens_of(deltas, request)) == 4
    assert deltas[-1].finish_reason == "length"


def test_min_tokens_forbids_the_end_token_until_then():
    script = dict.fromkeys(range(2, 30), 1)
    engine = Engine(FakeBackend(script=script))
    request = engine.add([3, 4, 5], SamplingParams(temperature=0, max_tokens=9, min_tokens=5))
    tokens = tokens_of(run(engine), request)
    assert len(tokens) == 6
    assert 1 not in tokens[:5]
    assert tokens[5] == 1


def test_without_max_tokens_a_sequence_fills_the_context():
    engine = Engine(FakeBackend(fake_plan(context=32)))
    request = engine.add([3, 4, 5], SamplingParams(temperature=0, ignore_eos=True))
    deltas = run(engine)
    assert len(tokens_of(deltas, request)) == 32 - 3
    assert deltas[-1].finish_reason == "length"


def test_max_tokens_beyond_the_context_is_clipped_to_it():
    engine = Engine(FakeBackend(fake_plan(context=32)))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1000)
    request = engine.add([3] * 31, params)
    assert len(tokens_of(run(engine), request)) == 1


def test_a_nan_ends_its_sequence_alone_and_its_pages_are_never_found_again():
    engine = Engine(FakeBackend(poison={60}))
    prompt = [9, 8, 7, 6, 60]
    bad = engine.add(prompt, GREEDY)
    good = engine.add([9, 8, 7, 5, 3], GREEDY)
    deltas = run(engine)
    end = [d for d in deltas if d.request is bad]
    assert [(d.finish_reason, d.token_ids) for d in end] == [("error", ())]
    assert "not a number" in bad.error
    assert tokens_of(deltas, good) == expected_tokens([9, 8, 7, 5, 3], GREEDY, 0, 8)
    again = engine.add([9, 8, 7, 6, 5], GREEDY)
    run(engine)
    assert again.cached_tokens == 0


def test_an_infinite_logit_ends_its_sequence():
    engine = Engine(FakeBackend(spread=math.inf))
    engine.add([3, 4], SamplingParams(temperature=0))
    deltas = run(engine)
    assert [d.finish_reason for d in deltas] == ["error"]


def test_a_backend_that_fails_once_loses_no_token():
    prompt = list(range(2, 30))
    backend = FakeBackend(fail_steps={1, 2, 4, 7})
    engine = Engine(backend)
    request = engine.add(prompt, GREEDY)
    deltas = []
    while engine.has_work:
        try:
            deltas += engine.step()
        except RuntimeError:
            engine.kv_cache.check()
    assert tokens_of(deltas, request) == expected_tokens(prompt, GREEDY, 0, 8)


def test_a_running_sequence_never_lacks_a_page():
    plan = fake_plan(context=40, max_batch=4)
    backend = FakeBackend(plan, num_pages=12)  # room for one sequence of 40 and a bit
    engine = Engine(backend)
    rng = random.Random(2)
    wanted = []
    for _ in range(20):
        prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 20))]
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=rng.randrange(1, 21))
        wanted.append((engine.add(prompt, params), prompt, params))
    deltas = run(engine)
    for request, prompt, params in wanted:
        tokens = expected_tokens(prompt, params, 0, params.max_tokens)
        assert tokens_of(deltas, request) == tokens
