"""The benchmark: what it counts, what it checks, what it reports."""

import csv
import io
import json
from itertools import pairwise
from statistics import median

import numpy as np
import pytest

from fake_backend import FakeBackend, fake_plan
from flashformer.backends import open_backend
from flashformer.backends.base import StepResult
from flashformer.errors import UsageError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import RandomWeights
from flashformer.plan.plan import PlanOptions
from flashformer.serve.benchmark import run as run_module
from flashformer.serve.benchmark.cases import Case, make_cases, parse_numbers, slot_positions
from flashformer.serve.benchmark.checks import run_checks
from flashformer.serve.benchmark.measure import Measured, measure
from flashformer.serve.benchmark.report import make_row
from flashformer.serve.benchmark.steps import Run, Steps

ROW_FIELDS = {
    "test",
    "depth",
    "batch",
    "format",
    "tok_s",
    "tok_s_spread",
    "ms_per_step",
    "bytes_per_step",
    "gb_s",
    "share",
    "samples",
}


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """The reference backend with a small random model, three sequences and 80 positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        spec = ModelSpec.from_hf({**SHAPES["smollm2-135m"], **small, **heads, "vocab_size": 300})
        options = PlanOptions(context=80, max_batch=3)
        return open_backend("reference", spec, RandomWeights(spec), options, num_pages=15)


ONE = Run(1.0, np.zeros((1, 1), np.int32))


class Broken:
    """A backend whose logits are wrong in one way."""

    def __init__(self, backend, spoil):
        self._backend, self._spoil, self.plan = backend, spoil, backend.plan
        self.calls = 0

    def step(self, batch):
        self.calls += 1
        result = self._backend.step(batch)
        logits = np.array(result.logits)
        self._spoil(self, batch, logits)
        return StepResult(logits, result.argmax)


def spoil_with_nan(broken, batch, logits):
    logits[..., 3] = np.nan


def spoil_now_and_then(broken, batch, logits):
    logits[...] = np.nextafter(logits, np.float32(broken.calls % 2))


def spoil_batches(broken, batch, logits):
    if len(batch.token_ids) == 3:
        logits[1] = np.nextafter(logits[1], np.float32(9))


def spoil_prompts(broken, batch, logits):
    if len(set(batch.slots)) < len(batch.slots):
        logits += np.linspace(0, 1, logits.shape[-1], dtype=np.float32)


def spoil_everything(broken, batch, logits):
    logits[...] = np.arange(logits.shape[-1])


def test_a_right_backend_passes_all_checks(backend):
    checks = run_checks(Steps.of(backend), 3)
    assert checks.passed, checks.failed()


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        (spoil_with_nan, "logits_finite"),
        (spoil_now_and_then, "repeat_bit_equal"),
        (spoil_batches, "batch_row_equals_alone"),
        (spoil_prompts, "prompt_equals_decode"),
        (spoil_everything, "logits_vary"),
    ],
)
def test_a_wrong_backend_fails_the_check_that_is_meant_for_it(backend, spoil, failed):
    checks = run_checks(Steps.of(Broken(backend, spoil)), 3)
    assert failed in checks.failed()


def test_a_failed_check_ends_with_1_and_no_speed(cli, monkeypatch):
    opened = run_module.open_backend

    class BrokenCpu(Broken):
        def read_bandwidth(self, seconds=0.1, *, own_image=False):
            return 1.0

        def close(self):
            self._backend.close()

    monkeypatch.setattr(
        run_module, "open_backend", lambda *a, **k: BrokenCpu(opened(*a, **k), spoil_with_nan)
    )
    ended = cli("bench", "--device", "reference", "-p", 8, "-n", 2, "-r", 1)
    assert "logits_finite" in ended.error(1)
    assert ended.out == ""
    as_json = cli("bench", "--device", "reference", "-p", 8, "-n", 2, "-r", 1, "--json")
    assert set(as_json.json) == {"error"}


def test_rounds_go_through_all_cases_in_turn_and_read_memory_before_each(backend, monkeypatch):
    order = []
    steps = Steps.of(backend)
    cases = make_cases([4], [2], [0], [1, 2])
    monkeypatch.setattr(Steps, "run", lambda self, case: order.append(case) or ONE)
    measured = measure(steps, cases, 3, lambda: order.append("read") or 7.0, lambda *_: None)
    warm_up, rounds = order[: len(cases)], order[len(cases) :]
    assert [case.kind for case in warm_up] == ["pp", "tg", "tg"]
    assert rounds == [*(step for case in cases for step in ("read", case))] * 3 + ["read"]
    assert measured.read_gb_s == [7.0] * 10
    assert all(len(samples) == 3 for samples in measured.seconds.values())


def test_decoding_goes_on_at_the_depth_with_the_tokens_that_the_model_chose(backend):
    steps = Steps.of(backend)
    seen = []
    real = backend.step

    class Watched(Broken):
        def step(self, batch):
            result = real(batch)
            seen.append((batch.token_ids.copy(), batch.positions.copy(), result.argmax.copy()))
            return result

    watched = Steps(Watched(backend, None), steps.page_table)
    watched.fill([6, 6], lambda *_: None)
    filled = len(seen)
    watched.run(Case("tg", 4, 6, 2))
    decoded = seen[filled:]
    assert [list(positions) for _, positions, _ in decoded] == [[6 + i] * 2 for i in range(4)]
    for (_, _, chosen), (ids, _, _) in pairwise(decoded):
        assert list(ids) == list(chosen)


def test_slots_have_pages_of_their_own(backend):
    table = Steps.of(backend).page_table
    assert table.shape == (3, 5)
    assert len(set(table.ravel())) == table.size
    assert table.max() < backend.num_pages


def test_a_row_counts_the_plan_s_bytes_and_divides_by_the_median_time(backend):
    plan = backend.plan
    case = Case("tg", 4, 10, 2)
    measured = Measured([10.0, 20.0, 30.0], {case: [0.4, 0.1, 0.2]}, tokens_equal=True)
    row = make_row(case, plan, measured)
    assert row.samples == [20.0, 80.0, 40.0]
    assert (row.tok_s, row.tok_s_spread) == (40.0, 30.0)
    assert row.ms_per_step == pytest.approx(50.0)
    mean = sum(plan.bytes_per_step(10 + i, 2) for i in (1, 2, 3, 4)) / 4
    assert row.bytes_per_step == pytest.approx(mean, abs=1)
    assert row.gb_s == pytest.approx(row.bytes_per_step / 0.05 / 1e9)
    assert row.share == pytest.approx(row.gb_s / 20.0)


def test_a_prompt_of_several_chunks_is_several_steps(backend):
    chunk = backend.plan.machine.max_rows
    case = Case("pp", chunk + 6, 0, 1)
    row = make_row(case, backend.plan, Measured([1.0], {case: [0.3]}, tokens_equal=True))
    assert row.ms_per_step == pytest.approx(150.0)
    assert row.tok_s == pytest.approx((chunk + 6) / 0.3)


def test_chunks_of_a_prompt_end_at_multiples_of_its_rows():
    backend = FakeBackend(fake_plan(context=64, prompt_rows=16))
    case = Case("pp", 30, 10, 1)  # 6, 16 and 8 rows

    assert make_row(
        case, backend.plan, Measured([1.0], {case: [0.3]}, tokens_equal=True)
    ).ms_per_step == (pytest.approx(100.0))
    Steps.of(backend).prompt(0, 0, np.zeros(10, np.int32), want_logits=False)
    result = Steps.of(backend).prompt(0, 10, np.zeros(30, np.int32))

    assert [len(rows) for rows in backend.batches] == [10, 6, 16, 8]
    assert len(result.logits) == 1


def test_slots_that_need_fewer_positions_get_fewer_pages(backend):
    cases = [Case("tg", 4, 60, 1), Case("tg", 4, 10, 2)]
    assert slot_positions(cases) == [64, 14]
    table = Steps.of(backend, [64, 14]).page_table
    assert [list(row) for row in table] == [[0, 1, 2, 3], [4, -1, -1, -1]]


def test_rounds_that_choose_other_tokens_are_noticed(backend, monkeypatch):
    steps = Steps.of(backend)
    case = Case("tg", 3, 5, 2)
    assert measure(steps, [case], 3, lambda: 1.0, lambda *_: None).tokens_equal
    runs = iter(range(10))
    monkeypatch.setattr(
        Steps, "run", lambda self, case: Run(1.0, np.full((3, 2), next(runs) // 3, np.int32))
    )
    assert not measure(steps, [case], 3, lambda: 1.0, lambda *_: None).tokens_equal


def test_deeper_cases_do_not_depend_on_what_shallow_ones_leave_behind(backend):
    steps = Steps.of(backend)
    cases = [Case("tg", 4, 40, 1), Case("tg", 9, 0, 1), Case("pp", 5, 0, 1), Case("pp", 5, 40, 1)]
    measured = measure(steps, cases, 3, lambda: 1.0, lambda *_: None)
    assert measured.tokens_equal
    assert set(measured.seconds) == set(cases)


def test_lists_of_numbers_are_read_or_refused():
    assert parse_numbers("-d", "0,4096") == [0, 4096]
    with pytest.raises(UsageError, match="-d takes whole numbers"):
        parse_numbers("-d", "0;1")
    assert [case.test for case in make_cases([0, 8], [4], [0], [1])] == ["pp8", "tg4"]


def test_bench_json_has_the_promised_fields_for_two_models_in_one_process(cli):
    ended = cli(
        *("bench", "--quant", "bf16,int4", "-p", 16, "-n", 3, "-d", "0,40", "-b", "1,2"),
        *("-r", 2, "--device", "cpu", "--threads", 2, "--json"),
    )
    assert ended.code == 0, ended.err
    document = ended.json
    machine = document["machine"]
    assert machine["read_gb_s"] == pytest.approx(median(machine["read_samples"]))
    assert 0.5 < machine["read_gb_s"] < 5000
    assert machine["threads"] == 2
    assert {"date", "versions", "git", "flashformer", "command"} <= set(document)
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        assert set(row) == ROW_FIELDS
        assert len(row["samples"]) == 2
        assert row["tok_s"] == pytest.approx(median(row["samples"]))
        assert row["gb_s"] == pytest.approx(row["bytes_per_step"] / row["ms_per_step"] / 1e6)
    assert {row["test"] for row in rows} == {"pp16", "tg3"}
    assert all(document["checks"][name]["passed"] for name in ("bf16", "int4"))
    halves = {row["format"]: row["bytes_per_step"] for row in rows if row["test"] == "tg3"}
    assert halves["int4"] < 0.4 * halves["bf16"]


def test_the_other_forms_hold_the_same_rows(cli, monkeypatch):
    case = Case("tg", 4, 10, 2)

    def measured(steps, cases, repeats, read, progress):
        return Measured([10.0], {case: [0.1] for case in cases}, tokens_equal=True)

    monkeypatch.setattr(run_module, "measure", measured)
    monkeypatch.setattr(run_module, "ReadsMemory", object)
    monkeypatch.setattr(
        "flashformer.backends.reference.ReferenceBackend.read_bandwidth", None, raising=False
    )
    flags = ("bench", "--device", "reference", "-p", 0, "-n", 4, "-d", 10, "-b", 2, "-o")
    table = cli(*flags, "md").out
    assert "| model | size | params | backend | test | tok/s | ms/step | GB/s | share |" in table
    assert "| tg4 b2 @ d10 | 80.00 ± 0.00 | 25.00 |" in table
    (row,) = csv.DictReader(io.StringIO(cli(*flags, "csv").out))
    (same,) = [json.loads(line) for line in cli(*flags, "jsonl").out.splitlines()]
    assert set(row) == set(same) == ROW_FIELDS
    assert float(row["tok_s"]) == same["tok_s"] == cli(*flags, "json").json["rows"][0]["tok_s"]
    assert case.test == same["test"]
