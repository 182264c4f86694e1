"""From a model and some cases to speeds: open, check, measure.

`Model` + cases -> `Result`
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from flashformer.backends import machine_of, open_backend
from flashformer.errors import FlashFormerError, UsageError
from flashformer.model.shapes import SHAPES
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import AnyWeights, CheckpointWeights, WeightSource
from flashformer.plan.plan import PlanOptions
from flashformer.serve.benchmark.cases import Case, slot_positions
from flashformer.serve.benchmark.checks import PROMPT_TOKENS, Checks, run_checks
from flashformer.serve.benchmark.measure import Measured, measure
from flashformer.serve.benchmark.report import Row, make_row
from flashformer.serve.benchmark.steps import Steps, num_pages
from flashformer.serve.load import open_checkpoint
from flashformer.serve.speed import ReadsMemory
from flashformer.serve.terminal import Terminal


@dataclass(frozen=True, slots=True)
class Model:
    """What is measured."""

    name: str
    spec: ModelSpec
    weights: WeightSource
    stored_format: str


@dataclass(frozen=True, slots=True)
class Setup:
    """How it is measured."""

    format: str  # of the weights
    head_format: str
    cases: tuple[Case, ...]
    repeats: int
    device: str
    threads: int | None = None
    read_seconds: float = 0.1  # of reading memory, before every case


@dataclass(frozen=True, slots=True)
class Result:
    """One weight format: the checks, the speeds, the machine."""

    image_bytes: int
    backend: str
    checks: Checks
    read_gb_s: list[float]
    rows: list[Row]  # of the cases, in their order


def find_model(model: str | None, shape: str | None) -> Model:
    """A checkpoint, random weights of a shape, or the embedded default."""
    if shape is None:
        checkpoint = open_checkpoint(model)
        spec = ModelSpec.from_hf(checkpoint.config, checkpoint.generation_config)
        stored = CheckpointWeights(checkpoint, spec)
        return Model(checkpoint.folder.name, spec, stored, stored.dtype)
    if model is not None:
        raise UsageError("give a model or --model-shape, not both")
    if shape not in SHAPES:
        raise UsageError(f"--model-shape takes {', '.join(SHAPES)}, not {shape!r}")
    spec = ModelSpec.from_hf(SHAPES[shape])
    return Model(f"{shape} (random)", spec, AnyWeights(spec), "bf16")


@contextmanager
def opened(model: Model, setup: Setup, terminal: Terminal) -> Iterator[Steps]:
    """The model on its device, with pages for every case.

    Raises `UsageError` for a device that cannot measure its memory.
    """
    positions = [max(PROMPT_TOKENS + 1, count) for count in slot_positions(setup.cases)]
    options = PlanOptions(setup.format, setup.head_format, max(positions), len(positions))
    machine = machine_of(setup.device, model.spec, setup.threads)
    backend = open_backend(
        setup.device,
        model.spec,
        model.weights,
        options,
        num_pages=num_pages(positions, machine),
        threads=setup.threads,
        progress=terminal.progress,
    )
    terminal.clear()
    with closing(backend):
        if not isinstance(backend, ReadsMemory):
            raise UsageError(f"bench cannot measure the memory of device {machine.kind}; use cpu")
        yield Steps.of(backend, positions)


def check_and_measure(steps: Steps, setup: Setup, terminal: Terminal) -> Result:
    """Every case of a model that was opened. Raises `FlashFormerError` if a check fails."""
    backend, plan = steps.backend, steps.backend.plan
    assert isinstance(backend, ReadsMemory)  # as `opened` has found
    checks = run_checks(steps, plan.options.max_batch)
    _require(checks, setup)
    measured: Measured = measure(
        steps,
        list(setup.cases),
        setup.repeats,
        lambda: backend.read_bandwidth(setup.read_seconds),
        terminal.progress,
    )
    terminal.clear()
    checks = replace(checks, rounds_choose_equal_tokens=measured.tokens_equal)
    _require(checks, setup)
    rows = [make_row(case, plan, measured) for case in setup.cases]
    workers = "threads" if plan.machine.kind == "cpu" else "CTAs"
    kind = f"{plan.machine.kind} {plan.machine.arch}, {plan.machine.num_ctas} {workers}"
    return Result(plan.image_bytes, kind, checks, measured.read_gb_s, rows)


def _require(checks: Checks, setup: Setup) -> None:
    if not checks.passed:
        raise FlashFormerError(
            f"the {setup.format} kernel fails the checks {', '.join(checks.failed())}, so no "
            "speed is reported; please report this"
        )
