"""What 1000 concurrent streams leave behind whose clients leave at random, in every way.

python benchmarks/server/clients.py [--clients 1000] [--rounds 3]
"""

import argparse
import random
import selectors
import socket
import statistics
import struct
import time
from typing import Any

from running import Running, rss_growth, run_and_record

WAYS = ("close", "reset", "half-close", "never-read", "to-the-end")
LONGEST_STAY = 6.0  # seconds
RSS_SHARE = 0.05
# After it, because Python keeps the arenas that the first thousand requests needed.
WARM_ROUNDS = 1
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, no time


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every round, and what was held before and after it."""
    rng = random.Random(1)
    flags = ("--queue", "2000", "--queue-time", "120")
    with Running(*flags) as server:
        fill_cache(server)
        idle = server.resources()
        rounds = []
        for number in range(WARM_ROUNDS + arguments.rounds):
            before = latency(server)
            result = one_round(server, arguments.clients, rng)
            result["latency_before_ms"], result["latency_after_ms"] = before, latency(server)
            result["resources"] = server.resources()
            result["tasks"] = server.metrics()["event_loop_tasks"]
            rounds.append(result)
            print(number, result)
        leftovers = server.leftovers()
    first, last = rounds[WARM_ROUNDS - 1], rounds[-1]
    growth = rss_growth(first["resources"], last["resources"])
    same = all(
        last["resources"][name][what] == first["resources"][name][what]
        for name in growth
        for what in ("descriptors", "threads")
    )
    passed = (
        same
        and not any(leftovers.values())
        and last["tasks"] == first["tasks"]
        and max(growth.values()) <= RSS_SHARE
    )
    return {
        "passed": passed,
        "clients": arguments.clients,
        "leftovers": leftovers,
        "rss_growth": growth,
        "rss_growth_of_the_first_round": rss_growth(idle, first["resources"]),
        "before": idle,
        "rounds": rounds,
    }


def fill_cache(server: Running) -> None:
    """Write to every KV page once: the system provides memory when it is first written."""
    for number in range(16):
        server.ask(body={"prompt": [number] * 1000, "max_tokens": 1})


def one_round(server: Running, num_clients: int, rng: random.Random) -> dict[str, Any]:
    """All clients at once; each leaves in its own way at its own time."""
    clients: dict[socket.socket, tuple[float, str]] = {}
    waiting = selectors.DefaultSelector()
    began = time.monotonic()
    for number in range(num_clients):
        way = WAYS[number % len(WAYS)]
        stay = 1e9 if way == "to-the-end" else rng.uniform(0, LONGEST_STAY)
        tokens = 4 if way == "to-the-end" else rng.choice((30, 300, 900))
        body = {"prompt": [5, 9, number % 200], "max_tokens": tokens, "ignore_eos": True}
        sock = server.open({**body, "stream": True, "seed": number})
        sock.setblocking(False)
        clients[sock] = (time.monotonic() + stay, way)
        if way != "never-read":
            waiting.register(sock, selectors.EVENT_READ)
    connected = time.monotonic() - began
    num_read = 0
    while clients:
        for key, _ in waiting.select(0.01):
            sock = key.fileobj
            data = read(sock)
            num_read += data.count(b"data: {")
            if not data or b"[DONE]" in data:
                waiting.unregister(sock)
                clients.pop(sock)
                sock.close()
        now = time.monotonic()
        for sock, (leave, way) in list(clients.items()):
            if now >= leave:
                clients.pop(sock)
                if way != "never-read":
                    waiting.unregister(sock)
                depart(sock, way)
    last = time.monotonic()
    idle = server.wait_idle()
    return {
        "connect_seconds": round(connected, 2),
        "seconds": round(last - began, 2),
        "events_read": num_read,
        "idle_after_seconds": round(idle, 3),
    }


def read(sock: socket.socket) -> bytes:
    """What is there; empty when the server has hung up."""
    try:
        return sock.recv(1 << 16)
    except OSError:
        return b""


def depart(sock: socket.socket, way: str) -> None:
    """Leave."""
    if way == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    if way == "half-close":
        try:
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(10)
            while sock.recv(1 << 16):
                pass
        except OSError:
            pass
    sock.close()


def latency(server: Running) -> float:
    """Milliseconds of a small request, the median of many."""
    samples = []
    for _ in range(50):
        began = time.perf_counter()
        server.ask(body={"prompt": [5, 9], "max_tokens": 4, "ignore_eos": True})
        samples.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(samples), 3)


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    run_and_record("clients", measure, add)
