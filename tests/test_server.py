"""The server over HTTP: what it answers about itself, streams, refusals, disconnects, the end."""

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest

from flashformer.engine.llm import LLM
from flashformer.engine.sampling import SamplingParams
from serving import IDS, TINY, Serving, wait_until

LONG = {"max_tokens": 240, "ignore_eos": True, "seed": 7}


@pytest.fixture(scope="module")
def serving():
    with Serving() as running:
        yield running
        assert running.wait_idle()


def test_the_text_is_that_of_the_python_api(serving):
    params = SamplingParams(seed=7, max_tokens=12, ignore_eos=True, logprobs=2, n=2)
    with LLM(device="reference", context=256) as llm:
        (expected,) = llm.generate({"prompt_token_ids": IDS}, params)
    body = {"seed": 7, "max_tokens": 12, "ignore_eos": True, "logprobs": 2, "n": 2}
    status, answer, _ = serving.ask(body=body)
    assert status == 200
    for output in expected.outputs:
        own = [e for e in answer["events"] if e["at"] == [0, output.index]]
        assert [i for e in own for i in e["ids"]] == output.token_ids
        assert "".join(e["text"] for e in own) == output.text
        told = [value for e in own for entry in e["logprobs"] for value in entry.values()]
        assert told == [p.logprob for entry in output.logprobs for p in entry.values()]


def test_a_stream_says_what_the_whole_answer_says(serving):
    body = {"seed": 7, "max_tokens": 12, "prompts": [IDS, [4, 5]], "prompt_logprobs": 1}
    _, answer, _ = serving.ask(body=body)
    begin, *events, done = serving.stream(body)
    assert (begin, done) == ("begin", "[DONE]")
    streamed = [json.loads(event) for event in events]
    for entries in (streamed, answer["events"]):
        entries.sort(key=lambda entry: entry["at"])
        for entry in entries:
            entry.pop("cached")
    assert streamed == answer["events"]
    assert {e["at"][0]: e["prompt_logprobs"] for e in streamed if "prompt_logprobs" in e} == {
        0: len(IDS),
        1: 2,
    }


def test_what_the_server_says_about_itself(serving):
    assert serving.ask("/health")[:2] == (200, {"status": "ok"})
    assert serving.ask("/ready")[:2] == (200, {"status": "ready"})
    assert "version" in serving.ask("/version")[1]
    (model,) = serving.ask("/v1/models")[1]["data"]
    assert serving.ask(f"/v1/models/{model['id']}")[1] == model
    assert serving.ask("/v1/models/org/other")[0] == 404
    text = serving.ask("/metrics")[1].decode()
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_sum",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count",
        "kernel_step_seconds_bucket",
        "prefix_cache_hits_total",
        "nonfinite_logits_total",
    ):
        assert f"flashformer:{name}" in text
    assert 'request_success_total{finished_reason="length"}' in text


def test_the_live_picture_shows_who_holds_a_slot(serving):
    stream = serving.stream(LONG, headers={"X-Request-Id": "live-1"})
    next(stream), next(stream)
    assert wait_until(lambda: [s.request_id for s in serving.client.stats().slots] == ["live-1"])
    connection = serving.connect()
    connection.request("GET", "/live")
    lines = iter(connection.getresponse().readline, None)
    data = [line for line in (next(lines) for _ in range(5)) if line.startswith(b"data: ")]
    connection.close()
    picture = json.loads(data[1].removeprefix(b"data: "))  # behind what the model is
    assert picture["max_batch"] == 8
    assert picture["pages_used"] > 0
    assert picture["tokens_per_second"] > 0
    stream.close()
    assert serving.wait_idle()


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompts": [[1] * 300]}, "context_length_exceeded", None),
        ({"prompts": [[99999]]}, "invalid_value", None),
        ({"prompts": [[]] * 3000}, "invalid_value", "n"),
        ({"prompts": []}, "invalid_value", "n"),
        ({"n": 9}, "invalid_value", "n"),
        ({"stop_token_ids": [70000]}, "invalid_value", "stop_token_ids"),
        ({"stop": "\ud800"}, "invalid_value", "stop"),
        ({"max_tokens": 250, "min_tokens": 250}, "invalid_value", "min_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_can_never_run_is_refused_with_400(serving, body, code, param, stream):
    status, answer, headers = serving.ask(body={**body, "stream": stream})
    assert status == 400
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert answer["error"]["type"] == "invalid_request_error"
    assert "x-request-id" in headers


def test_a_short_plain_request_id_is_echoed_and_any_other_replaced(serving):
    assert serving.ask("/health", headers={"X-Request-Id": "abc-1"})[2]["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "päth", ""):
        answer = serving.ask("/health", headers={"X-Request-Id": bad})
        assert answer[2]["x-request-id"].startswith("req-")


def test_a_bug_in_a_route_is_a_500_in_json_without_a_traceback(serving):
    status, answer, headers = serving.ask(body={"no such parameter": 1})
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "Traceback" not in json.dumps(answer)
    assert headers["x-request-id"].startswith("req-")


def test_what_is_not_there_and_what_is_not_possible_are_json_errors(serving):
    assert serving.ask("/v1/embeddings", {})[0] == 404
    status, answer, _ = serving.ask("/raw")
    assert (status, answer["error"]["code"]) == (405, "not_found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_frees_its_slot(serving, stream, how):
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = b"POST /raw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock = socket.create_connection(("127.0.0.1", serving.port))
    sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert wait_until(lambda: serving.client.stats().num_running == 1)
    if how == "half-close":
        sock.shutdown(socket.SHUT_WR)
    elif how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how != "half-close":
        sock.close()
    tokens = serving.client.stats().total_tokens
    assert serving.wait_idle(2.0)
    assert serving.client.stats().total_tokens - tokens < 100, "it ran to its end"
    sock.close()


def test_a_full_queue_answers_429_and_says_when_to_come_back():
    with Serving(queue_sequences=2) as serving:
        streams = [serving.stream({**LONG, "n": 5}) for _ in range(2)]
        for stream in streams:
            next(stream), next(stream)
        status, answer, headers = serving.ask(body={"n": 2})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert answer["error"]["type"] == "rate_limit_error"
        assert int(headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        assert serving.wait_idle()
        assert serving.ask(body={"n": 2, "max_tokens": 2})[0] == 200


def test_a_request_that_waits_or_runs_too_long_is_ended():
    with Serving(queue_time=0.3, request_time=0.6) as serving:
        running = serving.stream({**LONG, "n": 8})
        next(running), next(running)
        status, answer, headers = serving.ask(body={})
        assert (status, answer["error"]["code"]) == (503, "queue_time")
        assert headers["retry-after"] == "1"
        events = list(running)
        if "error" in events[-2]:  # a fast machine may finish in time
            assert json.loads(events[-2])["error"]["code"] == "request_time"
        assert events[-1] == "[DONE]"
        assert serving.wait_idle()


def test_an_engine_killed_amid_eight_streams_is_replaced_and_they_go_on_to_the_same_text():
    bodies = [{**LONG, "seed": i, "max_tokens": 120 + 10 * i} for i in range(8)]
    with Serving() as serving:
        expected = [serving.tokens(body) for body in bodies]
        got = [None] * 8

        def read(i):
            got[i] = serving.tokens(bodies[i])

        threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: serving.client.stats().num_running == 8)
        os.kill(serving.client.engine_pid, signal.SIGKILL)
        assert wait_until(lambda: serving.ask("/ready")[0] == 503, 1.0)
        assert serving.ask("/health")[0] == 200
        for thread in threads:
            thread.join(60)
        assert got == expected
        assert serving.client.stats().engine_restarts == 1
        assert serving.ask("/ready")[0] == 200
        assert b"replayed_requests_total 8.0" in serving.ask("/metrics")[1]


def test_a_hung_engine_is_killed_and_its_streams_go_on():
    with Serving(step_time=0.5) as serving:
        expected = serving.tokens(LONG)
        stream = serving.stream(LONG)
        first = [next(stream) for _ in range(3)]
        os.kill(serving.client.engine_pid, signal.SIGSTOP)
        rest = list(stream)
        ids = [i for e in (*first[1:], *rest[:-1]) for i in json.loads(e)["ids"]]
        assert ids == expected
        assert b"kernel_watchdog_trips_total 1.0" in serving.ask("/metrics")[1]


def test_an_engine_that_keeps_dying_is_given_up_with_a_reason():
    with Serving(max_restarts=1) as serving:
        stream = serving.stream(LONG)
        next(stream)
        os.kill(serving.client.engine_pid, signal.SIGKILL)
        assert wait_until(lambda: serving.client.stats().engine_restarts == 1)
        assert wait_until(lambda: serving.ask("/ready")[0] == 200, 30)
        stream.close()
        os.kill(serving.client.engine_pid, signal.SIGKILL)
        assert wait_until(lambda: serving.ask("/health")[0] == 503, 10)
        status, answer, _ = serving.ask(body={})
        assert (status, answer["error"]["code"]) == (503, "engine_down")


def test_stopping_lets_open_requests_end_and_refuses_new_ones():
    with Serving(drain_time=20.0) as serving:
        stream = serving.stream(LONG)
        next(stream)
        serving.stop()
        assert wait_until(lambda: serving.client.draining)
        status, answer, headers = serving.ask(body={})
        assert (status, answer["error"]["code"]) == (503, "draining")
        assert "retry-after" in headers
        events = list(stream)
        assert json.loads(events[-2])["reason"] == "length"
        assert serving.join(5.0)
        assert serving.code == 0


def test_stopping_ends_what_does_not_end_in_time_and_a_second_stop_ends_it_at_once():
    with Serving(drain_time=30.0) as serving:
        stream = serving.stream({**LONG, "n": 8})
        next(stream)
        serving.stop()
        serving.stop()
        events = list(stream)
        assert json.loads(events[-2])["error"]["code"] == "server_shutting_down"
        assert events[-1] == "[DONE]"
        assert serving.join(5.0)


def test_an_idle_server_ends_within_a_second_and_takes_its_processes_along():
    with Serving() as serving:
        pid = serving.client.engine_pid
        began = time.monotonic()
        serving.stop()
        assert serving.join(5.0)
        assert time.monotonic() - began < 1.5
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_exit_code(tmp_path):
    load = replace(TINY.load, model=str(tmp_path))
    with (
        pytest.raises(Exception, match=r"config\.json") as caught,
        Serving(replace(TINY, load=load)),
    ):
        pass
    assert caught.value.exit_code == 3
