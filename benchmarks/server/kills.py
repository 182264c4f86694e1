"""kill -9 at random moments of load, cache write, decode and shutdown: is the next start clean.

python benchmarks/server/kills.py [--times 100] [--seed 4]
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from running import Running, children, run_and_record, spawn

PHASES = ("load", "cache write", "decode", "shutdown", "engine amid decode")
ORPHAN_SECONDS = 2.0
BODY = {"prompt": [5, 9, 2, 44], "max_tokens": 24, "temperature": 0.8, "seed": 5, "logprobs": 2}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every phase in turn, each time with a start and an answer behind it."""
    rng = random.Random(arguments.seed)
    counts = dict.fromkeys(PHASES, 0)
    failures = []
    orphans = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FLASHFORMER_CACHE_DIR"] = cache
        with Running() as server:
            expected = server.ask(body=BODY)[1]["choices"]
        for number in range(arguments.times):
            phase = PHASES[number % len(PHASES)]
            orphans.append(kill_in(phase, rng, Path(cache)))
            with Running() as server:
                status, body = server.ask(body=BODY)
                if status != 200 or body["choices"] != expected:
                    failures.append([number, phase, body])
            counts[phase] += 1
    return {
        "passed": not failures and max(orphans) <= ORPHAN_SECONDS,
        "kills": counts,
        "failures": failures,
        "longest_orphan_seconds": round(max(orphans), 3),
    }


def kill_in(phase: str, rng: random.Random, cache: Path) -> float:
    """Start, kill at a random moment of the phase; how long children outlived their parent."""
    if phase == "cache write":
        shutil.rmtree(cache)
        cache.mkdir()
    if phase in ("load", "cache write"):
        process = spawn()
        time.sleep(rng.uniform(0.0, 1.5 if phase == "load" else 5.0))
        family = children(process.pid)
        process.kill()
        process.wait()
        return outlived(family)
    server = Running()
    socks = [server.open({**BODY, "max_tokens": 900, "stream": True}) for _ in range(8)]
    time.sleep(rng.uniform(0.0, 0.3))
    family = children(server.pid)
    if phase == "engine amid decode":
        os.kill(server.engine_pid, signal.SIGKILL)
        time.sleep(rng.uniform(0.0, 0.5))
    elif phase == "shutdown":
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(rng.uniform(0.0, 0.3))
    server.stop(signal.SIGKILL)
    for sock in socks:
        sock.close()
    return outlived(family)


def outlived(pids: list[int]) -> float:
    """Seconds until all of these processes are gone."""
    began = time.monotonic()
    while any(alive(pid) for pid in pids) and time.monotonic() - began < 10:
        time.sleep(0.01)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=4, help="of the moments")


if __name__ == "__main__":
    run_and_record("kills", measure, add)
