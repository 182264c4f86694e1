"""The engine over the fake backend: every token must be what the sequence alone implies."""

import math
import random

import numpy as np
import pytest

from fake_backend import FakeBackend, fake_plan, tiny_spec, true_logits
from flashformer.engine.engine import Engine
from flashformer.engine.logprobs import log_softmax
from flashformer.engine.sampler import Draw, TokenCounts, sample
from flashformer.engine.sampling import SamplingParams
from flashformer.errors import ParameterError, UsageError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
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


def run(engine, limit=2000):
    """All deltas until the engine is idle, with the page invariants checked after every step."""
    deltas = []
    for _ in range(limit):
        if not engine.has_work:
            return deltas
        deltas += engine.step()
        engine.kv_cache.check()
    raise AssertionError("the engine does not come to an end")


def tokens_of(deltas, request, index=0):
    own = [d for d in deltas if d.request is request and d.index == index]
    return [t for d in own for t in d.token_ids]


def expected_tokens(prompt, params, seed, max_tokens, index=0, eos=(1,), vocab_size=64):
    """The tokens by the definition alone, without pages, batches or chunks."""
    tokens = list(prompt)
    counts = TokenCounts(prompt)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    for step in range(max_tokens):
        forbidden = sorted(stops) if step < params.min_tokens else []
        draw = Draw(seed, len(tokens), index)
        token = sample(true_logits(tokens, vocab_size), params, draw, counts, forbidden)
        counts.add(token)
        tokens.append(token)
        if token in stops:
            break
    return tokens[len(prompt) :]


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


def test_logprobs_are_the_float32_log_softmax_of_the_raw_logits():
    engine = Engine(FakeBackend())
    prompt = [4, 5, 6]
    params = SamplingParams(
        temperature=0.5, repetition_penalty=2.0, logit_bias={9: 50.0}, logprobs=5, max_tokens=4
    )
    request = engine.add(prompt, params)
    deltas = run(engine)
    tokens = list(prompt)
    for delta in deltas:
        raw = log_softmax(true_logits(tokens))
        (entries,) = delta.logprobs
        (chosen,) = delta.token_ids
        best = np.argsort(-raw, kind="stable")
        assert next(iter(entries)) == chosen
        assert set(entries) == {chosen, *best[:5].tolist()}
        for token_id, entry in entries.items():
            assert entry.logprob == float(raw[token_id])
            assert best[entry.rank - 1] == token_id
        tokens.append(chosen)
    assert request.finished


def test_prompt_logprobs_tell_how_likely_each_prompt_token_was():
    engine = Engine(FakeBackend(fake_plan(max_rows=8)))
    prompt = [9, 8, 7, 6, 5, 4, 3, 2, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    params = SamplingParams(prompt_logprobs=2, max_tokens=2, temperature=0, n=2, ignore_eos=True)
    engine.add(prompt, GREEDY)
    run(engine)  # so that the prompt could be taken from the cache
    request = engine.add(prompt, params)
    run(engine)
    assert request.prompt_logprobs[0] is None
    assert len(request.prompt_logprobs) == len(prompt)
    for place in range(1, len(prompt)):
        raw = log_softmax(true_logits(prompt[:place]))
        assert request.prompt_logprobs[place][prompt[place]].logprob == float(raw[prompt[place]])
        assert len(request.prompt_logprobs[place]) in (2, 3)


def test_the_logits_of_a_text_are_those_of_every_position():
    engine = Engine(FakeBackend(fake_plan(max_rows=8)))
    ids = [3, 9, 27, 17, 51, 25, 11, 33, 35, 41, 59, 49]
    running = engine.add(ids, GREEDY)
    engine.step()
    logits = engine.logits(ids)
    engine.kv_cache.check()
    assert logits.dtype == np.float32
    for place in range(len(ids)):
        np.testing.assert_array_equal(logits[place], true_logits(ids[: place + 1]))
    assert tokens_of(run(engine), running) == expected_tokens(ids, GREEDY, 0, 8)


def test_logits_beside_a_full_batch_are_refused_with_a_sentence():
    engine = Engine(FakeBackend(fake_plan(max_batch=1)))
    engine.add([3, 4], GREEDY)
    engine.step()
    with pytest.raises(UsageError, match="in use by 1 sequences"):
        engine.logits([1, 2])


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([3] * 64, "64 tokens, but the context holds 64"),
        ([3] * 500, "500 tokens, but the context holds 64"),
        ([3, 64], "token id 64 at place 1 .* vocabulary of 64"),
        ([3, -1], "token id -1 at place 1"),
        ([3, 1.5], "must be integers, but number 1 is a float"),
        ([True], "must be integers, but number 0 is a bool"),
        (["a"], "must be integers"),
        ([2**70], "outside the model's vocabulary"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_with_numbers(prompt, sentence):
    engine = Engine(FakeBackend())
    with pytest.raises(UsageError, match=sentence):
        engine.add(prompt, GREEDY)
    assert not engine.has_work


def test_an_empty_prompt_starts_from_the_bos_token():
    engine = Engine(FakeBackend())
    request = engine.add([], GREEDY)
    assert tokens_of(run(engine), request) == expected_tokens([0], GREEDY, 0, 8)


def test_an_empty_prompt_without_a_bos_token_is_refused():
    engine = Engine(FakeBackend(fake_plan(tiny_spec(bos=None))))
    with pytest.raises(UsageError, match="no beginning-of-sequence token"):
        engine.add([], GREEDY)


def test_numpy_token_ids_are_taken_as_integers():
    engine = Engine(FakeBackend())
    request = engine.add(np.array([5, 9, 2]), GREEDY)
    assert request.prompt_token_ids == (5, 9, 2)
    assert all(type(t) is int for t in request.prompt_token_ids)


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        (SamplingParams(min_tokens=60), "min_tokens"),
        (SamplingParams(stop=["x"]), "stop"),
        (SamplingParams(stop_token_ids=[64]), "stop_token_ids"),
        (SamplingParams(logit_bias={64: 1.0}), "logit_bias"),
        (SamplingParams(allowed_token_ids=[3, 99]), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=[1], min_tokens=2), "allowed_token_ids"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_refused_by_name(params, parameter):
    engine = Engine(FakeBackend())
    with pytest.raises(ParameterError) as caught:
        engine.add([3] * 10, params)
    assert caught.value.parameter == parameter
    assert not engine.has_work


def test_a_request_that_can_never_have_its_pages_is_refused_at_once():
    engine = Engine(FakeBackend(fake_plan(context=64), num_pages=5))
    with pytest.raises(UsageError, match=r"need \d+ KV pages, but there are 5"):
        engine.add([3] * 10, SamplingParams())
    engine.add([3] * 10, SamplingParams(max_tokens=5))
    run(engine)


def test_a_step_must_have_room_for_the_whole_batch():
    plan = fake_plan(max_rows=8, max_batch=8)
    object.__setattr__(plan.machine, "max_rows", 7)
    with pytest.raises(UsageError, match="7 rows cannot hold 8 sequences"):
        Engine(FakeBackend(plan, num_pages=16))
