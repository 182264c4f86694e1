"""An engine over a device that draws many tokens by itself gives what one token a step gives."""

import pytest

from fake_backend import GREEDY, FakeBackend, expected_tokens, fake_plan, run, tokens_of
from fake_launches import ManyTokens
from flashformer.engine.engine import Engine
from flashformer.engine.sampling import SamplingParams
from test_engine_fuzz import EngineMachine


class LaunchMachine(EngineMachine):
    """Any order of adding, stepping and cancelling, while the device runs ahead and fails."""

    kind = ManyTokens


TestLaunchMachine = LaunchMachine.TestCase
TestLaunchMachine.settings = EngineMachine.TestCase.settings

KINDS = [
    GREEDY,
    SamplingParams(seed=3, max_tokens=9),
    SamplingParams(seed=4, temperature=0.7, top_k=9, top_p=0.9, max_tokens=30),
    SamplingParams(seed=5, repetition_penalty=1.4, frequency_penalty=0.5, max_tokens=20),
    SamplingParams(seed=6, logit_bias={7: 3.0}, min_p=0.1, max_tokens=20),
    SamplingParams(seed=7, min_tokens=6, stop_token_ids=[5], max_tokens=20),
    SamplingParams(seed=8, allowed_token_ids=[2, 3, 4, 9], n=2, max_tokens=7),
    SamplingParams(seed=9, stop_token_ids=list(range(2, 9)), max_tokens=40),
    SamplingParams(seed=10, stop_token_ids=list(range(2, 9)), min_tokens=3, max_tokens=40),
]


@pytest.mark.parametrize("ahead", [0, 1, 20])
def test_every_kind_of_request_has_the_tokens_of_the_definition(ahead):
    backend = ManyTokens(fake_plan(max_batch=4), ahead=ahead)
    engine = Engine(backend)
    requests = [engine.add([11 + i, 12, 13], params) for i, params in enumerate(KINDS)]
    deltas = run(engine)

    for i, request in enumerate(requests):
        for index in range(request.params.n):
            expected = expected_tokens(
                [11 + i, 12, 13], request.params, request.seed, request.max_tokens, index
            )
            assert tokens_of(deltas, request, index) == expected
    assert backend.launches
    assert len(backend.launches) < sum(len(d.token_ids) for d in deltas) / 3


def test_one_request_is_one_launch():
    backend = ManyTokens()
    engine = Engine(backend)
    request = engine.add([20, 21], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    deltas = run(engine)

    assert len(tokens_of(deltas, request)) == 40
    assert len(backend.launches) == 1  # after the prompt's step, which gives the first token
    assert [len(d.token_ids) for d in deltas] == [1] * 40


def test_a_prompt_that_arrives_ends_the_launch_at_the_next_token():
    backend = ManyTokens(ahead=0)
    engine = Engine(backend)
    long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    first = engine.add([20], long)
    for _ in range(5):
        engine.step()
    second = engine.add([30], GREEDY)
    seen = []
    for _ in range(3):
        seen += engine.step()

    assert any(delta.request is second for delta in seen)
    assert len(backend.launches[0].drawn) <= 6
    deltas = run(engine)
    assert first.finished
    assert second.finished
    assert len(tokens_of(seen + deltas, second)) == 8


def test_a_launch_ends_for_whoever_has_news_and_nothing_starts_before_they_are_told():
    backend = ManyTokens(ahead=0)
    engine = Engine(backend)
    request = engine.add([20], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    deltas = [delta for _ in range(4) for delta in engine.step()]
    (launch,) = backend.launches

    engine.unless = lambda: True
    deltas += engine.step()  # the token that the device is at
    assert engine.step() == []
    assert launch.ended
    assert backend.launches == [launch]

    engine.unless = lambda: False
    deltas += run(engine)
    assert len(backend.launches) == 2
    expected = expected_tokens([20], request.params, request.seed, request.max_tokens)
    assert tokens_of(deltas, request) == expected


def test_a_prompt_without_a_slot_lets_the_launch_go_on():
    backend = ManyTokens(fake_plan(max_batch=1))
    engine = Engine(backend)
    requests = [engine.add([20 + i], GREEDY) for i in range(3)]
    run(engine)

    assert all(request.finished for request in requests)
    assert len(backend.launches) == 3


def test_a_cancelled_sequence_stops_the_device_at_once():
    backend = ManyTokens(ahead=0)
    engine = Engine(backend)
    request = engine.add([20], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert not backend.launches[-1].stopped
    (delta,) = engine.cancel(request)

    assert delta.finish_reason == "abort"
    assert backend.launches[-1].stopped
    assert not engine.has_work
    again = engine.add([20], GREEDY)
    assert len(tokens_of(run(engine), again)) == 8


def test_neighbours_keep_the_tokens_that_were_drawn_before_a_launch_was_stopped():
    plan = fake_plan(max_batch=2)
    kinds = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    ]
    outcomes = []
    for backend in (ManyTokens(plan, ahead=9), FakeBackend(plan)):
        engine = Engine(backend)
        victim, neighbour = (engine.add([20 + i], params) for i, params in enumerate(kinds))
        deltas = [delta for _ in range(8) for delta in engine.step()]
        engine.cancel(victim)
        deltas += run(engine)
        outcomes.append(tokens_of(deltas, neighbour))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]) == 30


def test_a_failing_device_loses_no_token():
    backend = ManyTokens(fail_steps={5, 9, 10})
    engine = Engine(backend)
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    request = engine.add([20, 21], params)
    deltas, failures = [], 0
    while engine.has_work:
        try:
            deltas += engine.step()
        except RuntimeError:
            failures += 1

    assert failures == 3
    assert tokens_of(deltas, request) == expected_tokens([20, 21], params, 1, 20, eos=())


def test_logits_of_a_text_may_be_asked_for_in_the_middle_of_a_launch():
    backend = ManyTokens(ahead=4)
    engine = Engine(backend)
    request = engine.add([20, 21], SamplingParams(seed=2, max_tokens=30, ignore_eos=True))
    deltas = [delta for _ in range(5) for delta in engine.step()]
    assert engine.logits([1, 2, 3]).shape == (3, 64)
    deltas += run(engine)

    expected = expected_tokens([20, 21], request.params, 2, 30, eos=())
    assert tokens_of(deltas, request) == expected
