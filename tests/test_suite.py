"""A suite: every row beside its target, models one after the other, nothing lost on the way."""

import json

import numpy as np
import pytest

from fake_backend import fake_plan
from fake_launches import ManyTokens
from flashformer.errors import FlashFormerError, UsageError
from flashformer.model.shapes import SHAPES
from flashformer.serve.benchmark import run as run_module
from flashformer.serve.benchmark import suite as suite_module
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.checks import batch_chooses_as_alone
from flashformer.serve.benchmark.report import Row
from flashformer.serve.benchmark.steps import Steps
from flashformer.serve.benchmark.suite import step_ratio
from flashformer.serve.benchmark.targets import (
    JITTER,
    SHARE,
    STEP_RATIO,
    SUITES,
    Loaded,
    Target,
    targets_of,
)

TINY = {
    **SHAPES["smollm2-135m"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
BF16 = Loaded("tiny", "bf16", "bf16")


def share(name, loaded, bound, depth=4):
    return Target(name, loaded, Case("tg", 3, depth, 1), SHARE, bound)


@pytest.fixture
def cli(cli, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(suite_module, "READ_SECONDS", 0.01)
    return cli


def run(cli, monkeypatch, targets, *flags):
    monkeypatch.setitem(SUITES, "tiny", tuple(targets))
    return cli("bench", "--suite", "tiny", "--device", "cpu", "-r", 2, *flags)


def test_a_suite_says_for_every_row_whether_its_target_is_met(cli, monkeypatch, tmp_path):
    targets = [
        share("met", BF16, 0.0),
        share("missed", BF16, 1e9),
        Target("b1", BF16, Case("tg", 3, 6, 1), SHARE, None),
        Target("b2", BF16, Case("tg", 3, 6, 2), STEP_RATIO, 1e9),
        share("int4", Loaded("tiny", "int4", "int8"), 0.0),
    ]
    saved = tmp_path / "new" / "suite.json"
    ended = run(cli, monkeypatch, targets, "--save", saved)
    assert ended.code == 0, ended.err
    cells = {line.split("|")[1].strip(): line.split("|") for line in ended.out.splitlines()[2:-1]}
    assert {name: row[8].strip() for name, row in cells.items()} == {
        "met": "yes",
        "missed": "no",
        "b1": "",
        "b2": "yes",
        "int4": "yes",
    }
    document = json.loads(saved.read_text())
    assert [model["loaded"]["format"] for model in document["models"]] == ["bf16", "int4"]
    assert all(all(model["checks"].values()) for model in document["models"])
    rows = {r["name"]: r for model in document["models"] for r in model["reached"]}
    assert len(rows["met"]["row"]["samples"]) == 2
    limit = np.median(document["models"][0]["read_gb_s"])
    assert rows["met"]["value"] == pytest.approx(rows["met"]["row"]["gb_s"] / limit)
    assert document["kind"] == "suite"
    assert len(document["tree"]) == 40


def test_a_row_can_be_picked_and_a_pattern_that_fits_nothing_is_refused(cli, monkeypatch):
    ended = run(
        cli, monkeypatch, [share("a-1", BF16, 0.0), share("b-1", BF16, 0.0)], "--only", "a*"
    )
    assert "| a-1 |" in ended.out
    assert "b-1" not in ended.out
    with pytest.raises(UsageError, match="matches no row"):
        targets_of("h200", "nothing-*")
    with pytest.raises(UsageError, match="--suite takes"):
        targets_of("h100", None)
    assert "of its own" in cli("bench", "x", "--suite", "h200").error(2)
    assert "of its own" in cli("bench", "--suite", "h200", "--quant", "int8").error(2)
    assert "md or json" in cli("bench", "--suite", "h200", "-o", "csv").error(2)
    assert "give --suite" in cli("bench", "--only", "8b-*").error(2)


def test_a_suite_for_a_gpu_does_not_start_on_a_cpu_by_itself(cli, monkeypatch):
    monkeypatch.setattr("flashformer.backends._has_gpu", lambda: False)
    assert "none was found" in cli("bench", "--suite", "h200").error(2)


def test_a_format_that_the_build_lacks_is_left_out_and_no_error(cli, monkeypatch):
    targets = [share("no", Loaded("tiny", "int3", "bf16"), 0.0), share("yes", BF16, 0.0)]
    ended = run(cli, monkeypatch, targets)
    assert ended.code == 0
    assert "left out: tiny int3: the format int3 does not exist yet" in ended.out
    assert "| yes |" in ended.out


def test_a_model_that_fails_is_told_and_the_others_are_measured_and_kept(
    cli, monkeypatch, tmp_path
):
    targets = [share("broken", Loaded("tiny", "int8", "int8"), 0.0), share("sound", BF16, 0.0)]
    opened = run_module.open_backend

    def broken(device, spec, weights, options, **rest):
        if options.format == "int8":
            raise FlashFormerError("the GPU has fallen off the bus")
        return opened(device, spec, weights, options, **rest)

    monkeypatch.setattr(run_module, "open_backend", broken)
    ended = run(cli, monkeypatch, targets, "--save", tmp_path / "s.json")
    assert ended.code == 1
    assert "FAILED: tiny int8: the GPU has fallen off the bus" in ended.out
    assert "| sound |" in ended.out
    failed, sound = json.loads((tmp_path / "s.json").read_text())["models"]
    assert failed["failed"]
    assert not sound["failed"]
    assert sound["reached"]


def test_the_ratio_of_a_step_leaves_out_the_time_of_the_further_bytes():
    def row(ms, nbytes):
        return Row("tg1", 0, 1, "bf16", 0.0, 0.0, ms, nbytes, 0.0, 0.0, [])

    alone, batch = row(1.0, 4_000_000_000), row(1.35, 5_000_000_000)
    assert step_ratio(batch, alone, 4000.0) == pytest.approx(1.1)


class Clocked(ManyTokens):
    """Tokens of 100 ns, every tenth of 150."""

    def token_times(self, rows, page_table, num_steps):
        return [100 * i + 50 * (i // 10) for i in range(num_steps)]


def test_times_between_tokens_are_gathered_over_as_many_launches_as_it_takes():
    steps = Steps.of(Clocked(fake_plan(context=64)))
    times = steps.token_times(Case("tg", 11, 3, 1), 25)
    assert times == ([100] * 9 + [150]) * 2 + [100] * 5


def test_a_device_that_does_not_draw_by_itself_has_no_times(cli, monkeypatch):
    ended = run(cli, monkeypatch, [Target("j", BF16, Case("tg", 3, 4, 1), JITTER, 1.0)])
    assert ended.code == 1
    assert "does not draw tokens by itself" in ended.out


class Jumpy(ManyTokens):
    """A batch that goes another way than its sequences alone."""

    def launch(self, rows, page_table, num_steps):
        launched = super().launch(rows, page_table, num_steps)
        return launched if len(rows) == 1 else (tokens ^ 1 for tokens in launched)


@pytest.mark.parametrize(("kind", "equal"), [(ManyTokens, True), (Jumpy, False)])
def test_a_batch_must_choose_as_its_sequences_alone(kind, equal):
    steps = Steps.of(kind(fake_plan(context=64)))
    steps.fill([5, 5, 5], lambda *_: None)
    assert batch_chooses_as_alone(steps, Case("tg", 6, 5, 3)) is equal


def test_a_launch_that_ends_early_is_an_error():
    class Short(ManyTokens):
        def launch(self, rows, page_table, num_steps):
            return super().launch(rows, page_table, num_steps - 1)

    steps = Steps.of(Short(fake_plan(context=64)))
    steps.fill([5], lambda *_: None)
    with pytest.raises(FlashFormerError, match="ended after 5"):
        steps.run(Case("tg", 6, 5, 1))


def test_the_rows_of_the_h200_fit_their_models_and_stand_side_by_side():
    targets = SUITES["h200"]
    assert len({target.name for target in targets}) == len(targets)
    seen = list(dict.fromkeys(target.loaded for target in targets))
    assert [t.loaded for t in targets] == sorted((t.loaded for t in targets), key=seen.index)
    for target in targets:
        assert target.case.context <= SHAPES[target.loaded.shape]["max_position_embeddings"]
