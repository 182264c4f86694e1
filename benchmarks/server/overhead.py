"""What a token costs more through the server than through the Python API, at 8 streams.

python benchmarks/server/overhead.py
"""

import argparse
import selectors
import statistics
import time
from collections.abc import Callable
from typing import Any

from running import CONTEXT, Running, run_and_record

from flashformer import LLM, SamplingParams

NUM_STREAMS = 8
NUM_TOKENS = 1000
REPEATS = 7
LIMIT_US = 150.0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of both ways, taken in turns so that both meet the same machine."""
    through_server, through_api = [], []
    with Running(context=CONTEXT) as server, LLM(device="cpu", context=CONTEXT) as llm:
        for _ in range(REPEATS + 1):
            through_server.append(timed(lambda: stream_all(server)))
            through_api.append(timed(lambda: generate_all(llm)))
    del through_server[0], through_api[0]  # the first of each warms up
    served, direct = statistics.median(through_server), statistics.median(through_api)
    return {
        "passed": served - direct <= LIMIT_US,
        "streams": NUM_STREAMS,
        "tokens_each": NUM_TOKENS,
        "server_us_per_token": through_server,
        "api_us_per_token": through_api,
        "overhead_us_per_token": round(served - direct, 1),
    }


def timed(run: Callable[[], None]) -> float:
    """Microseconds a token."""
    began = time.perf_counter()
    run()
    return round(1e6 * (time.perf_counter() - began) / (NUM_STREAMS * NUM_TOKENS), 1)


def stream_all(server: Running) -> None:
    """All streams to their ends, over raw sockets."""
    waiting = selectors.DefaultSelector()
    tails = {}
    num_tokens = 0
    for number in range(NUM_STREAMS):
        body = {
            "prompt": [5, 9, 2, number],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        sock = server.open(body)
        sock.setblocking(False)
        waiting.register(sock, selectors.EVENT_READ)
        tails[sock] = b""
    while tails:
        for key, _ in waiting.select():
            sock = key.fileobj
            data = sock.recv(1 << 16)
            num_tokens += data.count(b"data: {")
            tails[sock] = (tails[sock] + data)[-64:]
            if not data or b"[DONE]" in tails[sock]:
                waiting.unregister(sock)
                del tails[sock]
                sock.close()
    assert num_tokens >= NUM_STREAMS, "the streams were empty"


def generate_all(llm: LLM) -> None:
    """The same through the Python API."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5, 9, 2, number]} for number in range(NUM_STREAMS)]
    llm.generate(prompts, params)


if __name__ == "__main__":
    run_and_record("overhead", measure)
