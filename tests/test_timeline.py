"""Moments of the kernel become slices, a table and a trace; no GPU is needed to know that."""

import json
from itertools import pairwise
from statistics import median

import numpy as np
import pytest

from flashformer.backends import open_backend
from flashformer.codegen.instruments import MOMENTS, TRACKS, render_moments
from flashformer.serve.benchmark.timeline import (
    chrome_trace,
    producer_us,
    slices_of,
    stage_times,
    token_us,
    whole_steps,
)

NUMBER = {moment.name: i for i, moment in enumerate(MOMENTS)}
LAYERS = 2
BASE = 6001 * 2**48 - 500  # ns, as the GPU counts them; the lower 48 bits are about to wrap


def recorded(num_ctas=3, steps=3, cut=None):
    """A made-up launch: a slice takes 100 ns for work, 40 for a wait, CTA c 10 c more of each."""
    words = np.zeros((num_ctas, len(TRACKS), 200, 2), np.uint64)

    def write(cta, track, names):
        now = BASE
        for i, (name, layer) in enumerate(names):
            now += (40 if MOMENTS[NUMBER[name]].kind == "wait" else 100) + 10 * cta
            words[cta, track, i, 0] = (now << 16 | layer << 8 | NUMBER[name]) & (2**64 - 1)
            words[cta, track, i, 1] = 7 << 32 | 30

    for cta in range(num_ctas):
        names, fills = [("start", 0)], [("first_fill", 0)]
        for _ in range(steps):
            names.append(("embed", 0))
            for layer in range(LAYERS):
                for matrix in ("qkv", "o_proj", "gate_up", "down"):
                    if matrix == "o_proj":
                        names.append(("attention", layer))
                        fills.append(("past_fill", layer))
                    names += [(f"{matrix}_input", layer), (matrix, layer)]
                    fills.append((f"{matrix}_fill", layer))
            names += [("lm_head_input", 2), ("lm_head", 2), ("meet", 0), ("sample", 0)]
            fills.append(("lm_head_fill", 2))
        write(cta, 0, names[:cut])
        write(cta, 1, fills)
    return words


def test_every_moment_but_the_first_of_a_track_ends_a_slice():
    slices = slices_of(recorded(steps=1))
    own = [s for s in slices if s.cta == 1 and s.track == "consumers"]
    assert len(own) == 1 + LAYERS * 9 + 4
    assert all(s.end - s.start == s.ns == (50 if s.kind == "wait" else 110) for s in own)
    assert all(a.end == b.start for a, b in pairwise(own))
    assert [s.stage for s in own[:4]] == ["embed", "qkv", "qkv", "attention"]
    assert {(s.ring_ns, s.packets_ns) for s in slices} == {(30, 7)}


def test_the_first_step_and_the_unfinished_last_are_left_out():
    steps = {s.step for s in whole_steps(slices_of(recorded(steps=4, cut=-5)))}
    assert steps == {0, 1}
    assert {s.step for s in whole_steps(slices_of(recorded(steps=1)))} == {0}
    assert whole_steps(slices_of(recorded(steps=1, cut=5))) == []
    assert slices_of(np.zeros((2, 2, 4, 2), np.uint64)) == []


def test_the_table_adds_up_the_layers_of_a_token_and_takes_the_median_cta():
    slices = whole_steps(slices_of(recorded()))
    rows = {row.stage: row for row in stage_times(slices)}
    assert list(rows) == [
        "embed", "qkv", "attention", "o_proj", "gate_up", "down", "lm_head", "sample",
    ]  # fmt: skip
    qkv = rows["qkv"]
    # Two layers of 110 ns, of which 7 are waits for packets, and of 50 ns of waiting.
    assert qkv.calls == LAYERS
    assert qkv.work_us == pytest.approx(2 * (110 - 7) / 1e3)
    assert qkv.wait_us == pytest.approx(2 * (50 + 7) / 1e3)
    assert qkv.work_max_us == pytest.approx(2 * (120 - 7) / 1e3)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    total = sum(row.total_us for row in rows.values())
    own = [sum(s.ns for s in slices if s.cta == 1 and s.track == "consumers") / 2e3]
    assert total == pytest.approx(median(own))


def test_a_token_lasts_from_its_first_slice_to_its_last():
    slices = whole_steps(slices_of(recorded()))
    assert len(token_us(slices)) == 2
    assert all(us > 0 for us in token_us(slices))


def test_the_producer_s_time_is_told_apart():
    found = producer_us(whole_steps(slices_of(recorded())))
    fills = LAYERS * 5 + 1
    assert found["all"] == pytest.approx(fills * 110 / 1e3)
    assert found["ring_full"] == pytest.approx(fills * 30 / 1e3)


def test_the_trace_has_a_track_an_sm_and_shows_the_waits():
    trace = json.loads(json.dumps(chrome_trace(slices_of(recorded()), "name")))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["tid"] for e in slices} == {0, 1, 2}
    assert {e["pid"] for e in slices} == {0, 1}
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert {*TRACKS, "SM of CTA 2"} <= names
    waits = [e for e in slices if e["cat"] == "wait"]
    assert waits
    assert all(e["name"].startswith("wait: ") for e in waits)
    assert all(e["dur"] > 0 for e in slices)


def test_moments_have_the_same_numbers_in_both_languages():
    names = render_moments().split("{", 1)[1].split("}", 1)[0].replace(" ", "").split(",")
    assert names == [moment.name for moment in MOMENTS]
    assert len(MOMENTS) <= 256
    assert len(set(names)) == len(names)
    assert {moment.track for moment in MOMENTS} == set(TRACKS)


class Recorded:
    """The reference backend with a timeline that somebody else has recorded."""

    def __init__(self, *arguments, trace_moments, **changes):
        self._backend = open_backend("reference", *arguments[1:], num_pages=changes["num_pages"])
        assert trace_moments >= 1 + 3 * 60

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def timeline(self):
        return recorded()

    def read_bandwidth(self):
        return 1000.0


def test_profile_prints_a_table_and_writes_a_trace(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("flashformer.serve.profile.open_profiled", Recorded)
    trace = tmp_path / "trace.json"
    flags = ["--device", "reference", "-d", 5, "-o", trace]

    ended = cli("profile", *flags)
    document = cli("profile", *flags, "--json").json

    assert ended.code == 0, ended.err
    for word in ("attention", "ring empty", "producer", "a token", str(trace)):
        assert word in ended.out
    assert json.loads(trace.read_text())["traceEvents"]
    assert document["stages"][0]["stage"] == "embed"
    assert len(document["token_us"]) == 2
    assert document["bytes_per_token"] > 0
    total = sum(part["us"] for part in document["waterfall"])
    assert total == pytest.approx(np.mean(document["token_us"]))
    assert "µs idle of" in ended.out


def test_profile_without_a_gpu_says_so_in_one_sentence(cli):
    ended = cli("profile", "--device", "cpu", "--model-shape", "llama-3.2-1b")
    assert "flashformer bench" in ended.error(2)


def test_profile_refuses_a_folder_that_does_not_exist(cli, tmp_path):
    ended = cli("profile", "-o", tmp_path / "missing" / "trace.json")
    assert "make it first" in ended.error(2)
