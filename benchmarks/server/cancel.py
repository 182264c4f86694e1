"""Clients that leave at every stage of a request, 200 times each: is anything left behind.

python benchmarks/server/cancel.py [--times 200]
"""

import argparse
import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import Any

from running import PATH, Running, run_and_record

CHAT = "/v1/chat/completions"
STREAM = {"stream": True, "ignore_eos": True, "max_tokens": 400}
SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every stage in turn."""
    rng = random.Random(2)
    stages: dict[str, Callable[[Running, int], None]] = {
        "connected": lambda server, i: sent_half(server),
        "tokenising": lambda server, i: leave(server, {"prompt": "word " * 200_000}, rng, 0.01),
        "template": lambda server, i: leave(server, chat(), rng, 0.003, CHAT),
        "grammar": lambda server, i: leave(server, formed(i), rng, 0.02, CHAT),
        "queued": lambda server, i: leave_queue(server),
        "prompt": lambda server, i: leave(server, long_prompt(i), rng, 0.02),
        "first token": lambda server, i: leave_after(server, 1),
        "midway": lambda server, i: leave_after(server, rng.randrange(2, 30)),
        "last token": lambda server, i: leave_after(server, 8, max_tokens=8),
        "whole answer": lambda server, i: leave(server, {**prompt(i), "stream": False}, rng, 0.05),
    }
    results = {}
    with Running() as server:
        server.ask(PATH, {**prompt(0), "max_tokens": 4, "stream": False})
        server.ask(CHAT, {**formed(0), "max_tokens": 1, "stream": False})
        for _ in range(8):  # all threads that encode long texts
            leave(server, {"prompt": "word " * 20_000}, rng, 0.01)
        server.wait_idle()
        before = server.resources()
        for name, stage in stages.items():
            began = time.monotonic()
            for number in range(arguments.times):
                stage(server, number)
            results[name] = {
                "times": arguments.times,
                "seconds": round(time.monotonic() - began, 2),
                "idle_after_seconds": round(server.wait_idle(), 3),
            }
        after = server.resources()
        tasks = server.metrics()["event_loop_tasks"]
        status, _ = server.ask(PATH, {**prompt(0), "max_tokens": 4, "stream": False})
    same = all(
        before[name][what] == after[name][what]
        for name in before
        for what in ("descriptors", "threads")
    )
    return {
        "passed": status == 200 and same,
        "stages": results,
        "before": before,
        "after": after,
        "tasks_after": tasks,
    }


def prompt(number: int) -> dict[str, Any]:
    """A request that runs long enough to be left."""
    return {**STREAM, "prompt": [5, 9, number % 200]}


def long_prompt(number: int) -> dict[str, Any]:
    """One whose prompt takes many steps."""
    return {**STREAM, "prompt": [number % 200, *range(100, 200)] * 9, "max_tokens": 30}


def chat() -> dict[str, Any]:
    """A conversation."""
    return {**STREAM, "messages": [{"role": "user", "content": "word " * 800}], "max_tokens": 9}


def formed(number: int) -> dict[str, Any]:
    """A schema that was never compiled before."""
    schema = {**SCHEMA, "title": f"number {number}"}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    message = {"role": "user", "content": "hi"}
    return {**STREAM, "messages": [message], "response_format": form, "ignore_eos": False}


def sent_half(server: Running) -> None:
    """Leave amid the request."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")


def leave(
    server: Running, body: dict[str, Any], rng: random.Random, longest: float, path: str = PATH
) -> None:
    """Leave some time after the request was sent."""
    with server.open({**STREAM, **body}, path):
        time.sleep(rng.uniform(0, longest))


def leave_after(server: Running, count: int, **fields: int) -> None:
    """Leave when the `count`-th event has come."""
    with server.open({**prompt(count), **fields}) as sock:
        seen = 0
        while seen < count and (data := sock.recv(1 << 14)):
            seen += data.count(b"data: ")


def leave_queue(server: Running) -> None:
    """Leave while eight others hold all slots, and then let those leave as well."""
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(server.open(prompt(i))) for i in range(8)]
        for holder in holders:
            holder.recv(1)
        with server.open(prompt(9)):
            time.sleep(0.002)


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--times", type=int, default=200)


if __name__ == "__main__":
    run_and_record("cancel", measure, add)
