"""A sequence that is interrupted all the time is timed, and has the tokens that it has alone."""

from contextlib import closing

import pytest

import interrupt
from fake_backend import fake_plan, tiny_spec
from fake_launches import FakeLaunch, ManyTokens
from flashformer.errors import FlashFormerError

SAMPLES = 6
STARTS = [(ManyTokens, "launch"), (ManyTokens, "step")]


def two_sequences():
    return ManyTokens(fake_plan(tiny_spec(vocab_size=256), context=256, max_batch=2))


def test_every_sample_is_kept_and_the_tokens_are_those_without_interruptions():
    found = interrupt.measure(two_sequences(), STARTS, SAMPLES)
    assert found["checks"] == dict.fromkeys(found["checks"], True)
    assert [row["what"] for row in found["rows"]] == ["join", "cancel"]
    for row in found["rows"]:
        assert len(row["samples_ms"]) == SAMPLES
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] == max(row["samples_ms"])
    assert found["tokens"] > 2 * SAMPLES
    assert ManyTokens.step.__module__ == "fake_launches"


def test_the_clock_runs_until_something_new_is_on_the_device():
    backend = two_sequences()
    with interrupt.watched(STARTS) as started:
        disturbed = interrupt.Disturbed(backend, started, token_ms=0.0)
        disturbed.round()
        launches, steps = len(backend.launches), len(backend.batches)
        disturbed.round()
        assert len(backend.launches) >= launches + 2
        assert len(backend.batches) > steps
    assert {len(launch.rows) for launch in backend.launches} == {1, 2}
    assert all(launch.ended for launch in backend.launches[:-1])


def test_tokens_that_an_interruption_changed_are_found(monkeypatch):
    backend = two_sequences()
    draw = FakeLaunch.draw

    def draw_wrongly(launch):
        draw(launch)
        if len(launch.rows) == 2 and launch.drawn:
            launch.drawn[-1] = launch.token_ids = (launch.drawn[-1] + 1) % 256

    monkeypatch.setattr(FakeLaunch, "draw", draw_wrongly)
    found = interrupt.measure(backend, STARTS, SAMPLES)
    assert not any(found["checks"].values())
    assert not found["passed"]
    assert "wrong: the_one_that_goes_on" in interrupt.table([{"name": "fake", **found}])


@pytest.mark.gpu
def test_a_gpu_draws_the_same_tokens_however_often_it_is_interrupted():
    from flashformer.backends.cuda.launch import Kernel

    with closing(interrupt.opened("qwen3-0.6b", 20)) as backend:
        found = interrupt.measure(backend, [(Kernel, "launch")], 20)
    assert found["checks"] == dict.fromkeys(found["checks"], True)


def test_a_sequence_that_ends_by_itself_ends_the_measurement():
    backend = ManyTokens(fake_plan(tiny_spec(vocab_size=256), context=48, max_batch=2))
    with pytest.raises(FlashFormerError, match="nobody cancelled: length"):
        interrupt.measure(backend, STARTS, 20)


@pytest.mark.parametrize(("longest", "met"), [(1.9, True), (2.1, False)])
def test_the_limit_holds_for_the_longest_sample(longest, met):
    found = interrupt.row("cancel", [0.5] * 199 + [longest])
    assert found["met"] is met
    assert found["p99_ms"] == 0.5
