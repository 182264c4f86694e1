"""How long a newcomer's first line takes: `flashformer run "def fibonacci(n):"`, nothing cached.

python benchmarks/server/first_run.py [--times 10]
"""

import argparse
import compileall
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from running import run_and_record

from flashformer.serve.benchmark.provenance import PACKAGE

PROMPT = "def fibonacci(n):"
CHECK = "\nassert [fibonacci(n) for n in range(2, 10)] == [1, 2, 3, 5, 8, 13, 21, 34]\n"
LIMIT_SECONDS = 1.0
_PR_SET_CHILD_SUBREAPER = 36


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """First runs with a cache of their own each, and beside each the next run, which has a kernel.

    A first run leaves a compiler behind. This process adopts it and waits for its end, so that it
    does not slow the next sample.
    """
    compileall.compile_dir(PACKAGE, quiet=1)  # as pip does when it installs
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    first, kernel, second, texts = [], [], [], []
    for _ in range(arguments.times):
        with tempfile.TemporaryDirectory() as cache:
            seconds, text = one_run(cache)
            first.append(seconds)
            began = time.monotonic()
            wait_for_orphans()
            kernel.append(round(time.monotonic() - began, 3))
            again, text_again = one_run(cache)
            second.append(again)
            texts += [text, text_again]
    right = sum(map(computes_fibonacci, texts))
    return {
        "passed": max(first) <= LIMIT_SECONDS and right == len(texts),
        "prompt": PROMPT,
        "first_run_seconds": first,
        "kernel_ready_after_seconds": kernel,
        "second_run_seconds": second,
        "right_answers": right,
        "text": texts[0],
    }


def one_run(cache: str) -> tuple[float, str]:
    """From the start of Python to its end, and what it wrote."""
    command = [sys.executable, "-m", "flashformer", "run", PROMPT]
    environment = {**os.environ, "FLASHFORMER_CACHE_DIR": cache}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return round(time.monotonic() - began, 3), done.stdout


def wait_for_orphans() -> None:
    """Until every process that an ended child left behind has ended too."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def computes_fibonacci(text: str) -> bool:
    """Whether the prompt and its continuation are a function that is right."""
    source = f"{PROMPT}{text}{CHECK}"
    command = [sys.executable, "-I", "-c", source]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--times", type=int, default=10)


if __name__ == "__main__":
    run_and_record("first_run", measure, add)
