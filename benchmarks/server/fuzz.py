"""100,000 structured wrong and half-wrong requests: no 5xx, and the last answer is the first.

python benchmarks/server/fuzz.py [--requests 100000]
"""

import argparse
import collections
import copy
import http.client
import json
import math
import random
import threading
import time
from typing import Any

from running import PATH, Running, rss_growth, run_and_record

NUM_THREADS = 8
VICTIM = {"prompt": [5, 9, 2, 44], "max_tokens": 24, "temperature": 0.8, "seed": 5, "logprobs": 5}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
COMMON: dict[str, Any] = {
    "max_tokens": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "stop": ["x"],
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "stream": False,
    "stream_options": {"include_usage": True},
    "user": "me",
    "ignore_eos": False,
    "min_tokens": 1,
    "stop_token_ids": [3],
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {**COMMON, "prompt": "a", "logprobs": 2, "echo": True, "suffix": None},
    "/v1/chat/completions": {
        **COMMON,
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "max_completion_tokens": 3,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    },
    "/v1/responses": {
        "input": "hi",
        "instructions": "be brief",
        "max_output_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "store": False,
        "stream": False,
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 3,
        "system": "be brief",
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "stream": False,
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
    },
    "/tokenize": {"prompt": "hello", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 9, 257, 2**31, -(2**31), 2**63, 2**64, 10**40, 0.5, -0.0,
    1e308, math.nan, math.inf, "", "a", "8", "\ud800", "\x00", "\u202e\u0301", "a" * 5000, [], {},
    [[]], [None], [1, "a"], [[1, 2], [3]], [-1], [99999], {"a": 1}, {"type": "object"},
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
    [{"role": "user"}], [{"role": "root", "content": "x"}], [{"role": "user", "content": None}],
    {"type": "function", "function": {"name": "f"}}, "required", "none", "json_object",
)  # fmt: skip
RAW = (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":1e400}', b"[" * 20000, b'{"a":1,"a":2}')


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The requests, in threads with connections of their own."""
    counts: collections.Counter[str] = collections.Counter()
    bad: list[Any] = []
    with Running(context=128) as server:  # what has no limit of its own ends soon
        first = answer(server)
        run(server, 2000, counts, bad, seed=0)  # fills pools and caches
        before = server.resources()
        began = time.monotonic()
        run(server, arguments.requests, counts, bad, seed=1)
        seconds = time.monotonic() - began
        server.wait_idle()
        after = server.resources()
        last = answer(server)
    return {
        "passed": not bad and first == last,
        "requests": arguments.requests,
        "per_second": round(arguments.requests / seconds, 1),
        "statuses": dict(sorted(counts.items())),
        "server_errors": bad[:20],
        "last_answer_is_the_first": first == last,
        "before": before,
        "after": after,
        "rss_growth": rss_growth(before, after),
    }


def run(
    server: Running, count: int, counts: collections.Counter[str], bad: list[Any], seed: int
) -> None:
    """`count` requests."""

    def work(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for _ in range(count // NUM_THREADS):
            path = rng.choice(list(BODIES))
            content = mutated(rng, path)
            status, data = post(connection, path, content)
            counts[f"{path} {status}"] += 1
            if status >= 500 or (status >= 400 and b'"error"' not in data):
                bad.append([path, content[:400].decode("latin-1"), status, data[:300].decode()])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def mutated(rng: random.Random, path: str) -> bytes:
    """A body with one to three fields changed, dropped, nested or added; or no body at all."""
    if rng.random() < 0.02:
        return rng.choice(RAW)
    body = copy.deepcopy(BODIES[path])
    optional = [name for name in body if name not in ("prompt", "messages", "input", "tokens")]
    for name in rng.sample(optional, rng.randrange(len(optional) + 1)):
        del body[name]
    if path != "/tokenize" and path != "/detokenize":
        body.setdefault("max_output_tokens" if path == "/v1/responses" else "max_tokens", 3)
    for _ in range(rng.randrange(1, 4)):
        place = inside(rng, body)
        name = rng.choice([*place, "unknown"] if isinstance(place, dict) else range(len(place)))
        if rng.random() < 0.1 and name in place:
            del place[name]
        else:
            place[name] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(body).encode()


def inside(rng: random.Random, value: Any) -> Any:  # noqa: ANN401 - JSON of any kind
    """The body itself or a container somewhere in it."""
    while True:
        parts = value.values() if isinstance(value, dict) else value
        deeper = [part for part in parts if isinstance(part, dict | list) and part]
        if not deeper or rng.random() < 0.6:
            return value
        value = rng.choice(deeper)


def post(connection: http.client.HTTPConnection, path: str, content: bytes) -> tuple[int, bytes]:
    """Status and body; a connection that the server closed is opened again."""
    for _ in range(2):
        try:
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (http.client.HTTPException, ConnectionError):
            connection.close()
    return 599, b"no answer"


def answer(server: Running) -> object:
    """Tokens, text and logprobs of a fixed request."""
    status, body = server.ask(PATH, VICTIM)
    assert status == 200, body
    return body["choices"]


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--requests", type=int, default=100_000)


if __name__ == "__main__":
    run_and_record("fuzz", measure, add)
