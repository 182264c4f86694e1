"""Idle memory has a name: what the consumers did while the ring was full."""

import pytest

from flashformer.serve.benchmark.timeline import Slice
from flashformer.serve.benchmark.waterfall import BELOW, READING, idle_us, lines, waterfall


def consumer(stage, kind, start, end, packets=0, step=0, cta=0):
    return Slice(cta, "consumers", stage, kind, 0, step, start, end, 0, packets)


def producer(start, end, ring, step=0, cta=0):
    return Slice(cta, "producer", "down", "work", 0, step, start, end, ring, 0)


TOKEN = [
    consumer("qkv", "wait", 0, 2000),
    consumer("qkv", "work", 2000, 5000),
    consumer("attention", "work", 5000, 8000, packets=1000),
    consumer("sample", "wait", 8000, 10000),
]


def test_a_full_ring_is_blamed_on_the_wait_that_it_falls_into():
    assert idle_us([*TOKEN, producer(0, 3000, 1500)]) == {"hand-off down → qkv": pytest.approx(1.5)}


def test_waits_for_packets_inside_a_stage_are_waits_too():
    found = idle_us([*TOKEN, producer(5000, 8000, 900)])
    assert found == {"hand-off qkv → attention": pytest.approx(0.9)}


def test_what_no_wait_explains_is_blamed_on_the_work():
    found = idle_us([*TOKEN, producer(1000, 6000, 3000)])
    # Waits of 1000 and 1000 ns lie within; the third microsecond is that of the work of 3000 ns.
    assert found == {
        "hand-off down → qkv": pytest.approx(1.0),
        "hand-off qkv → attention": pytest.approx(1.0),
        "qkv: computing": pytest.approx(1.0),
    }


def test_the_mean_is_over_ctas_and_tokens():
    def later(s, cta, step):
        at = 10_000 * step
        return Slice(cta, s.track, s.stage, s.kind, 0, step, s.start + at, s.end + at, s.ring_ns, 0)

    whole = [*TOKEN, producer(0, 2000, 800)]
    slices = [later(s, cta, step) for cta in (0, 1) for step in (0, 1, 2) for s in whole]
    slices = [s for s in slices if s.track == "consumers" or s.cta == 0]  # one of two is never full
    assert idle_us(slices) == {"hand-off down → qkv": pytest.approx(0.4)}


def test_the_parts_add_up_to_the_token_and_reading_is_bytes_over_bandwidth():
    slices = [*TOKEN, producer(0, 3000, 1500), producer(5000, 9500, 2000)]
    parts = waterfall(slices, bytes_per_token=5_000_000, read_gb_s=1000.0)
    assert sum(part.us for part in parts) == pytest.approx(10.0)
    assert [part.name for part in parts[:2]] == [READING, BELOW]
    assert parts[0].us == pytest.approx(5.0)
    assert [part.idle for part in parts] == [False, False, True, True, True]
    assert sum(part.us for part in parts if part.idle) == pytest.approx(3.5)
    text = "\n".join(lines(parts, 1000.0))
    assert "3.5 µs idle of 10.0 µs a token, at 1000 GB/s" in text


def test_without_a_whole_token_there_is_nothing_to_tell():
    assert waterfall([], 1, 1.0) == []
