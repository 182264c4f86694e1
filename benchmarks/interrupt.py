"""Measures how soon a launch of many tokens ends when a sequence joins or is cancelled.

python benchmarks/interrupt.py [--shapes llama-3.2-1b,llama-3.1-8b] [-o FILE]

One sequence goes on all the time. At random moments of a token the host hands the engine a second
one, and some tokens later cancels it. The clock runs from that call until the next kernel, the
prompt of the one that joins or the launch of the one that goes on, was put on the GPU's stream:
the launch before has ended then, whatever the engine and the driver did in between. Both sequences
must have the tokens that they have alone.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flashformer.backends import machine_of, open_backend
from flashformer.backends.base import Backend
from flashformer.engine.engine import Engine
from flashformer.engine.sampling import SamplingParams
from flashformer.engine.sequence import Request
from flashformer.errors import FlashFormerError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import AnyWeights
from flashformer.plan.plan import PlanOptions
from flashformer.serve.benchmark.provenance import COMMIT_HELP
from flashformer.serve.benchmark.steps import num_pages
from result_file import begin, new_path, save

LIMIT_MS = 2.0
FIRST, SECOND = tuple(range(100, 108)), tuple(range(200, 208))  # prompts; one kernel reads them
MOST_TOKENS = 3  # between two interruptions
WARM_UP_ROUNDS = 3  # no kernel that is timed is then the first of its kind
WARM_UP_TOKENS = 32
ROUND_TOKENS = 4 * MOST_TOKENS  # in the mean fewer, with those of a launch that is ending
SPARE_TOKENS = 256  # for moments in which the host is busy elsewhere
SEED = 1

Starts = Sequence[tuple[type, str]]  # methods that put work on the device


def main() -> None:
    """Measure every shape and write one result file; exit 1 if a limit is missed."""
    options = parse_arguments()
    import torch

    from flashformer.backends.cuda.launch import Kernel

    gpu = {"name": torch.cuda.get_device_name(0)}
    path = options.output or new_path(gpu["name"], "interrupt")
    result = {**begin("interrupt", options.commit), "gpu": gpu, "limit_ms": LIMIT_MS, "models": []}
    for shape in options.shapes.split(","):
        with closing(opened(shape, options.samples)) as backend:
            found = measure(backend, [(Kernel, "launch")], options.samples)
        result["models"].append({"name": shape, "weights": "random", "format": "bf16", **found})
        save(path, result)
    print(table(result["models"]))
    raise SystemExit(not all(model["passed"] for model in result["models"]))


def parse_arguments() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama-3.2-1b,llama-3.1-8b", help="of model/shapes.py")
    parser.add_argument("-n", "--samples", type=int, default=200, help="of each kind")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--commit", help=COMMIT_HELP)
    return parser.parse_args()


def opened(shape: str, samples: int) -> Backend:
    """Random weights on the GPU, with room for all tokens of two sequences."""
    spec = ModelSpec.from_hf(SHAPES[shape])
    context = len(FIRST) + (WARM_UP_ROUNDS + samples) * ROUND_TOKENS + SPARE_TOKENS
    options = PlanOptions("bf16", "bf16", context, max_batch=2)
    pages = num_pages([context] * 2, machine_of("cuda", spec))
    return open_backend("cuda", spec, AnyWeights(spec), options, num_pages=pages)


def measure(backend: Backend, starts: Starts, samples: int) -> dict[str, Any]:
    """Interrupt a sequence, check its tokens, and say how long either kind took."""
    pace = alone(backend, FIRST, WARM_UP_TOKENS)[1]
    with watched(starts) as started:
        disturbed = Disturbed(backend, started, float(np.median(pace)))
        for _ in range(WARM_UP_ROUNDS):
            disturbed.round()
        rounds = [disturbed.round() for _ in range(samples)]
    first, *others = disturbed.texts
    expected, token_ms = alone(backend, FIRST, len(first))
    longest = max(map(len, others))
    expected_others = alone(backend, SECOND, longest)[0]
    checks = {
        "the_one_that_goes_on_has_its_tokens": first == expected,
        "those_that_come_and_go_have_theirs": all(
            tokens == expected_others[: len(tokens)] for tokens in others
        ),
    }
    rows = [
        row("join", [joined for joined, _ in rounds]),
        row("cancel", [cancelled for _, cancelled in rounds]),
    ]
    return {
        "token_ms": float(np.median(token_ms)),
        "tokens": len(first),
        "checks": checks,
        "passed": all(checks.values()) and all(found["met"] for found in rows),
        "rows": rows,
    }


def row(what: str, samples_ms: list[float]) -> dict[str, Any]:
    """Percentiles of one kind of interruption; the limit holds for the longest."""
    p50, p99 = (float(np.percentile(samples_ms, q)) for q in (50, 99))
    longest = max(samples_ms)
    return {
        "what": what,
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": longest,
        "met": longest <= LIMIT_MS,
        "samples_ms": samples_ms,
    }


class Disturbed:
    """An engine with one sequence that goes on, and one that comes and goes."""

    def __init__(self, backend: Backend, started: list[float], token_ms: float) -> None:
        """`started`: the list in which `watched` notes moments."""
        self._engine = Engine(backend, prefix_reuse=False)
        self._started = started
        self._token_seconds = token_ms / 1e3
        self._random = random.Random(SEED)
        self._texts: defaultdict[Request, list[int]] = defaultdict(list)
        self._params = sampled(backend.plan.options.context - len(FIRST))
        self._engine.add(FIRST, self._params)
        self._step()

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of all sequences; the first is the one that goes on."""
        return list(self._texts.values())

    def round(self) -> tuple[float, float]:
        """Milliseconds of a join and of a cancellation."""
        requests: list[Request] = []
        joined = self._timed(lambda: requests.append(self._engine.add(SECOND, self._params)))
        cancelled = self._timed(lambda: self._engine.cancel(requests[0]))
        return joined, cancelled

    def _timed(self, interrupt: Callable[[], object]) -> float:
        """Milliseconds from a call, at a random moment of a launch, to the next kernel's start."""
        for _ in range(self._random.randint(1, MOST_TOKENS)):
            self._step()
        moment = time.perf_counter() + self._random.random() * self._token_seconds
        while time.perf_counter() < moment:
            pass
        self._started.clear()
        called = time.perf_counter()
        interrupt()
        while not self._started:
            self._step()
        return 1e3 * (self._started[0] - called)

    def _step(self) -> None:
        for delta in self._engine.step():
            self._texts[delta.request].extend(delta.token_ids)
            if delta.finish_reason is not None:
                why = delta.request.error or delta.finish_reason
                raise FlashFormerError(f"a sequence ended that nobody cancelled: {why}")


def alone(
    backend: Backend, prompt: tuple[int, ...], num_tokens: int
) -> tuple[list[int], list[float]]:
    """Tokens of a sequence that nobody interrupts, and milliseconds between them."""
    engine = Engine(backend, prefix_reuse=False)
    engine.add(prompt, sampled(num_tokens))
    tokens: list[int] = []
    moments: list[float] = []
    while engine.has_work:
        tokens += [token for delta in engine.step() for token in delta.token_ids]
        moments.append(1e3 * time.perf_counter())
    return tokens, np.diff(moments).tolist()


def sampled(max_tokens: int) -> SamplingParams:
    """Drawn, not greedy: a wrong position or key shows in the next token."""
    return SamplingParams(temperature=1.0, seed=SEED, max_tokens=max_tokens, ignore_eos=True)


@contextmanager
def watched(starts: Starts) -> Iterator[list[float]]:
    """Within it, the list gets the moment at which each call of one of the methods returns."""
    moments: list[float] = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in starts]

    def watch(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            result = function(*arguments, **named)
            moments.append(time.perf_counter())
            return result

        return call

    try:
        for owner, name, original in originals:
            setattr(owner, name, watch(original))
        yield moments
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def table(models: list[dict[str, Any]]) -> str:
    """What was found, for a person."""
    lines = [f"{'model':<16}{'token ms':>9}  {'':<8}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}  limit"]
    for model in models:
        for found in model["rows"]:
            numbers = "".join(f"{found[f'{what}_ms']:>8.3f}" for what in ("p50", "p99", "max"))
            met = "met" if found["met"] else "missed"
            head = f"{model['name']:<16}{model['token_ms']:>9.3f}  {found['what']:<8}"
            lines.append(f"{head}{numbers}  {LIMIT_MS} {met}")
        lines += [f"  wrong: {name}" for name, right in model["checks"].items() if not right]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
