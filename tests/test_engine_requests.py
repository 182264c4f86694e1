"""What the engine takes and refuses, and the numbers that it reports beside the tokens."""

import numpy as np
import pytest

from fake_backend import (
    GREEDY,
    FakeBackend,
    expected_tokens,
    fake_plan,
    run,
    tiny_spec,
    tokens_of,
    true_logits,
)
from flashformer.engine.engine import Engine
from flashformer.engine.logprobs import log_softmax
from flashformer.engine.sampling import SamplingParams
from flashformer.errors import ParameterError, UsageError


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
