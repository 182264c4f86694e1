"""A victim beside seven hostile neighbours must have the tokens and logprobs that it has alone.

python benchmarks/server/neighbours.py [--trials 500]
"""

import argparse
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from running import Running, run_and_record

VICTIM = {
    "prompt": [5, 9, 2, 44, 17, 3, 8],
    "max_tokens": 24,
    "seed": 11,
    "temperature": 0.9,
    "top_p": 0.95,
    "logprobs": 5,
    "ignore_eos": True,
}
HOSTILE: tuple[dict[str, Any], ...] = (
    {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 3.0},
    {"logit_bias": {"5": 100, "6": -100}, "logprobs": 5},
    {"logit_bias": {"5": 1e6}},  # refused
    {"n": 7, "temperature": 100.0},
    {"prompt": [1] * 700},
    {"prompt": [99999]},  # refused
    {"logprobs": 5, "echo": True},
    {"stop": ["a", "e", "\u00e9"], "min_tokens": 30},
    {"structured_outputs": {"regex": "[a-f]{3}x"}},
    {"structured_outputs": {"regex": "(" * 50}},  # refused
    {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "string"}}}}},
    {"allowed_token_ids": [7, 8]},
    {"top_k": 1, "min_p": 1.0, "top_p": 1e-9},
)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every trial; the neighbours are others each time, and some of them leave midway."""
    rng = random.Random(3)
    differing = []
    refused = served = 0
    with Running() as server, ThreadPoolExecutor(7) as pool:
        expected = answer(server)
        for trial in range(arguments.trials):
            leavers = [start(server, rng) for _ in range(rng.randrange(3))]
            bodies = [hostile(rng) for _ in range(7 - len(leavers))]
            neighbours = [pool.submit(ask, server, body) for body in bodies]
            if answer(server) != expected:
                differing.append(trial)
            for leaver in leavers:
                leaver.close()
            statuses = [neighbour.result() for neighbour in neighbours]
            refused += sum(400 <= status < 500 for status in statuses)
            served += statuses.count(200)
            if any(status >= 500 for status in statuses):
                differing.append(trial)
        server.wait_idle()
    return {
        "passed": not differing,
        "trials": arguments.trials,
        "differing": differing,
        "neighbours_served": served,
        "neighbours_refused": refused,
    }


def answer(server: Running) -> object:
    """The victim's tokens, text and logprobs."""
    status, body = server.ask(body=VICTIM)
    assert status == 200, body
    return body["choices"]


def hostile(rng: random.Random) -> dict[str, Any]:
    """One of the neighbours, with sizes of its own."""
    base = {"prompt": [rng.randrange(250) for _ in range(rng.randrange(1, 40))]}
    return {**base, "max_tokens": rng.randrange(1, 60), **rng.choice(HOSTILE)}


def ask(server: Running, body: dict[str, Any]) -> int:
    """The status that a neighbour gets."""
    return server.ask(body=body)[0]


def start(server: Running, rng: random.Random) -> socket.socket:
    """A neighbour that will leave in the middle."""
    return server.open({**hostile(rng), "max_tokens": 500, "stream": True})


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--trials", type=int, default=500)


if __name__ == "__main__":
    run_and_record("neighbours", measure, add)
