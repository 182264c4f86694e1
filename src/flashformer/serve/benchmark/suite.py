"""Runs a suite: every model once, its rows in turns with the reading of memory, then the next.

`Target`s -> `Outcome`s, those of each model as soon as they are measured
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from statistics import median

import numpy as np

from flashformer.backends import machine_of
from flashformer.errors import FlashFormerError, PlanError
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.quant.formats import CHOICES
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.checks import batch_chooses_as_alone
from flashformer.serve.benchmark.report import Row
from flashformer.serve.benchmark.run import Result, Setup, check_and_measure, find_model, opened
from flashformer.serve.benchmark.targets import JITTER, SHARE, STEP_RATIO, Loaded, Target
from flashformer.serve.terminal import Terminal

JITTER_TOKENS = 10_000
READ_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Reached:
    """A row that was measured; its numbers are medians over the samples, as in `Row`."""

    name: str
    what: str
    value: float
    bound: float | None  # None: measured for the sake of other rows
    met: bool | None
    row: Row
    token_ns: list[int]  # of jitter: every time between two tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model's rows."""

    loaded: Loaded
    seconds: float  # that all of it took, compiling and filling contexts included
    backend: str = ""
    image_bytes: int = 0
    checks: dict[str, bool] | None = None
    read_gb_s: tuple[float, ...] = ()
    reached: tuple[Reached, ...] = ()
    left_out: str = ""  # why there are no rows
    failed: bool = False  # and whether that is an error


def run_suite(
    targets: list[Target], repeats: int, device: str, terminal: Terminal
) -> Iterator[Outcome]:
    """Measure all rows; a model that fails is told and the others go on."""
    for loaded, rows in groupby(targets, key=lambda target: target.loaded):
        started = time.perf_counter()
        try:
            reason = _unsupported(loaded, device)
            if reason:
                outcome = Outcome(loaded, 0.0, left_out=reason)
            else:
                outcome = _run(loaded, list(rows), repeats, device, terminal)
        except FlashFormerError as error:
            outcome = Outcome(loaded, 0.0, left_out=str(error), failed=True)
        yield replace(outcome, seconds=round(time.perf_counter() - started, 1))


def _unsupported(loaded: Loaded, device: str) -> str:
    """Why this build cannot run a format; empty if it can."""
    for name in (loaded.format, loaded.head_format):
        if name not in CHOICES:
            return f"the format {name} does not exist yet"
    spec = find_model(None, loaded.shape).spec
    try:
        options = PlanOptions(loaded.format, loaded.head_format, 1, 1)
        make_plan(spec, machine_of(device, spec), options)
    except PlanError as error:
        return str(error)
    return ""


def _run(
    loaded: Loaded, targets: list[Target], repeats: int, device: str, terminal: Terminal
) -> Outcome:
    cases = [target.case for target in targets if target.what != JITTER]
    cases += [_alone(target.case) for target in targets if target.what == STEP_RATIO]
    jitter = [target.case for target in targets if target.what == JITTER]
    setup = Setup(
        loaded.format,
        loaded.head_format,
        tuple(dict.fromkeys([*cases, *jitter])),
        repeats,
        device,
        read_seconds=READ_SECONDS,
    )
    with opened(find_model(None, loaded.shape), setup, terminal) as steps:
        result = check_and_measure(steps, setup, terminal)
        together = all(batch_chooses_as_alone(steps, case) for case in cases if case.batch > 1)
        if not together:
            raise FlashFormerError(
                f"sequences of {loaded.shape} in {loaded.format} choose other tokens in a batch "
                "than alone, so no speed is reported; please report this"
            )
        token_ns = {case: steps.token_times(case, JITTER_TOKENS) for case in jitter}
    rows = dict(zip(setup.cases, result.rows, strict=True))
    return Outcome(
        loaded,
        0.0,
        backend=result.backend,
        image_bytes=result.image_bytes,
        checks={**asdict(result.checks), "batch_chooses_as_alone": together},
        read_gb_s=tuple(result.read_gb_s),
        reached=tuple(_reached(t, rows, result, token_ns.get(t.case, [])) for t in targets),
    )


def _reached(target: Target, rows: dict[Case, Row], result: Result, token_ns: list[int]) -> Reached:
    row = rows[target.case]
    if target.what == JITTER:
        value = float(np.percentile(token_ns, 99) / np.median(token_ns))
    elif target.what == STEP_RATIO:
        value = step_ratio(row, rows[_alone(target.case)], median(result.read_gb_s))
    else:
        value = row.share
    of_jitter = token_ns if target.what == JITTER else []
    return Reached(target.name, target.what, value, target.bound, target.met(value), row, of_jitter)


def step_ratio(row: Row, alone: Row, read_gb_s: float) -> float:
    """A batch's step, without the time of its further bytes, over the step of one sequence."""
    extra_ms = (row.bytes_per_step - alone.bytes_per_step) / read_gb_s / 1e6
    return (row.ms_per_step - extra_ms) / alone.ms_per_step


def _alone(case: Case) -> Case:
    return replace(case, batch=1)


def table(outcomes: Iterable[Outcome]) -> str:
    """Every row beside its target, and what was left out."""
    lines = [
        "| row | tok/s | ms/step | GB/s | of GB/s | reached | target | met |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    notes = []
    for outcome in outcomes:
        lines += [line(reached, outcome) for reached in outcome.reached]
        if outcome.left_out:
            kind = "FAILED" if outcome.failed else "left out"
            name = f"{outcome.loaded.shape} {outcome.loaded.format}"
            notes.append(f"{kind}: {name}: {outcome.left_out}")
    return "\n".join([*lines, "", *notes])


def line(reached: Reached, outcome: Outcome) -> str:
    """A row of the table."""
    row = reached.row
    cells = (
        reached.name,
        f"{row.tok_s:.1f}",
        f"{row.ms_per_step:.4f}",
        f"{row.gb_s:.0f}",
        f"{median(outcome.read_gb_s):.0f}",
        shown(reached.what, reached.value),
        "" if reached.bound is None else bound_of(reached),
        {True: "yes", False: "no", None: ""}[reached.met],
    )
    return "| " + " | ".join(cells) + " |"


def bound_of(reached: Reached) -> str:
    """The target as text."""
    assert reached.bound is not None
    sign = "≥" if reached.what == SHARE else "≤"
    return f"{sign} {shown(reached.what, reached.bound)}"


def shown(what: str, value: float) -> str:
    """A share in percent, a ratio as a factor."""
    return f"{value:.1%}" if what == SHARE else f"{value:.3f} x"
