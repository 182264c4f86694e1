"""Who is let in, and what a client may send: keys, names, types, sizes, and slowness."""

import base64
import json
import socket
import time
from dataclasses import replace

import pytest

from flashformer.errors import UsageError
from flashformer.serve.server.guard import OPEN_PATHS, is_loopback
from flashformer.serve.server.run import require_safe
from serving import TINY, Serving, wait_until

KEY = "correct-horse-battery"
LIMITS = {
    "body_bytes": 4096,
    "header_bytes": 2048,
    "num_headers": 20,
    "header_time": 0.5,
    "body_time": 0.5,
    "stall_time": 0.6,
    "ping_time": 0.4,
    "connections": 12,
}


@pytest.fixture(scope="module")
def locked():
    with Serving(replace(TINY, api_keys=("another-key-before-it", KEY))) as running:
        yield running


@pytest.fixture(scope="module")
def limited():
    with Serving(**LIMITS) as running:
        yield running
        assert running.wait_idle()


def routes_of(serving):
    app = serving.server.app
    return [(r.path.replace("{model:path}", "x"), m) for r in app.routes for m in r.methods]


def test_every_route_but_the_page_and_two_needs_a_key(locked):
    seen = routes_of(locked)
    assert len(seen) >= 9
    for path, method in seen:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}x"}):
            body = {} if method == "POST" else None
            status, answer, _ = locked.ask(path, body, method=method, headers=headers)
            assert (status == 401) == (path not in OPEN_PATHS)
            if status == 401 and method != "HEAD":
                assert answer["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", ["", " ", "é", "\x7f", "x" * 1500, "Bearer", KEY[:-1], KEY.upper()])
def test_a_wrong_key_is_refused(locked, key):
    headers = {"Authorization": f"Bearer {key}".encode("latin-1", "replace").decode("latin-1")}
    assert locked.ask("/v1/models", headers=headers)[0] in (400, 401)
    assert locked.ask("/v1/models", headers={"x-api-key": headers["Authorization"]})[0] in (
        400,
        401,
    )


def test_a_key_may_come_in_three_ways(locked):
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"X-Api-Key": KEY},
        {"Authorization": f"Basic {basic}"},
        {"X-Api-Key": "another-key-before-it"},
    ):
        assert locked.ask("/v1/models", headers=headers)[0] == 200
    assert locked.ask("/v1/models", headers={"Authorization": "Basic !!"})[0] == 401


def test_no_key_no_wider_bind_than_loopback():
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="--api-key"):
            require_safe(replace(TINY, host=host))
        require_safe(replace(TINY, host=host, api_keys=(KEY,)))
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        require_safe(replace(TINY, host=host))
        assert is_loopback(host)
    for key in ("short", "with\nline", "schlüssel"):
        with pytest.raises(UsageError, match="API key"):
            require_safe(replace(TINY, api_keys=(key,)))


def test_a_page_elsewhere_cannot_use_the_server(limited):
    for host in ("evil.example", "localhost.evil.example", "", "127.0.0.2:80", "[::2]"):
        assert limited.ask("/v1/models", headers={"Host": host})[0] == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert limited.ask("/v1/models", headers={"Host": host})[0] == 200
    origin = {"Origin": "https://evil.example"}
    status, _, headers = limited.ask(
        "/raw", b"{}", headers={**origin, "Content-Type": "text/plain"}
    )
    assert status == 415
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    status, _, headers = limited.ask("/raw", method="OPTIONS", headers=preflight)
    assert status == 405
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_body_that_is_too_large_gets_413_whether_its_length_is_told_or_not(limited):
    status, answer, _ = limited.ask(body=b"x" * 5000)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    connection = limited.connect()
    chunks = iter([b"x" * 1000] * 8)
    connection.request("POST", "/raw", chunks, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()


def raw(serving, data, seconds=5.0):
    """What the server says to bytes, until it hangs up; and how long that took."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", serving.port), timeout=seconds) as sock:
        sock.sendall(data)
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return answer, time.monotonic() - began


@pytest.mark.parametrize(
    "head",
    [
        b"X-A: " + b"y" * 3000 + b"\r\n",
        b"X-A: y\r\n" * 30,
        b"X-A: " + b"y" * 2_000_000 + b"\r\n",
        b"X-A: " + b"y" * 5000,  # never complete
    ],
)
def test_headers_that_are_too_large_get_431(limited, head):
    answer, _ = raw(limited, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 "), answer[:80]


def test_an_url_that_is_too_long_gets_431(limited):
    answer, _ = raw(limited, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("data", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"GET"])
def test_headers_that_do_not_come_get_408(limited, data):
    answer, seconds = raw(limited, data)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.4 < seconds < 2.0


def test_a_body_that_does_not_come_gets_408(limited):
    head = b"POST /raw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer, seconds = raw(limited, head + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.4 < seconds < 2.0


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_gets_400_in_json(limited, data):
    answer, _ = raw(limited, data)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_more_connections_than_the_limit_get_503(limited):
    held = [socket.create_connection(("127.0.0.1", limited.port)) for _ in range(12)]
    try:
        assert wait_until(lambda: limited.connections >= 12)
        answer, _ = raw(limited, b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in answer
    finally:
        for sock in held:
            sock.close()
    assert wait_until(lambda: limited.ask("/health")[0] == 200)


def test_a_stream_that_nobody_reads_is_cut_and_one_that_is_silent_is_pinged(limited):
    body = json.dumps(
        {"stream": True, "max_tokens": 240, "n": 8, "ignore_eos": True, "logprobs": 20}
    )
    head = "POST /raw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", limited.port))
    assert wait_until(lambda: bool(limited.server.connections))
    for connection in list(limited.server.connections):  # the kernel would take megabytes
        peer = connection.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    assert wait_until(lambda: limited.client.num_open == 1)
    waiting = limited.connect()
    waiting.request(
        "POST",
        "/raw",
        json.dumps({"stream": True, "max_tokens": 2}),
        {"Content-Type": "application/json"},
    )
    answer = waiting.getresponse()
    first = answer.readline()
    assert first in (b": ping\n", b"data: begin\n")
    assert wait_until(lambda: limited.client.num_open == 0, 60.0)
    assert limited.wait_idle()
    sock.close()
    waiting.close()


def test_nothing_of_a_request_is_in_the_log_or_the_metrics(limited, caplog):
    caplog.set_level("DEBUG")
    canary = "canary-7c1f"
    limited.ask(body={"stop": canary, "max_tokens": 2}, headers={"Authorization": canary})
    assert limited.ask(body={"prompts": [[1]], "stop": [canary] * 99})[0] == 400
    limited.ask(f"/v1/models?key={canary}")
    assert canary not in limited.ask("/metrics")[1].decode()
    assert canary not in "\n".join(r.getMessage() for r in caplog.records)
    assert any("/raw" in r.getMessage() for r in caplog.records)
