"""From flags to a loaded model, or to its plan alone.

`LoadOptions` -> `LLM` | `Plan`
"""

from dataclasses import dataclass

from flashformer.backends import machine_of
from flashformer.codegen.cache import cache_dir
from flashformer.engine.llm import DEFAULT_CONTEXT, LLM
from flashformer.errors import UsageError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.default import default_checkpoint
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights
from flashformer.plan.machine import Machine
from flashformer.plan.pack import Progress
from flashformer.plan.plan import Plan, PlanOptions, make_plan
from flashformer.plan.planner import longest_context
from flashformer.quant.formats import QUANTS, head_format
from flashformer.serve.terminal import Terminal

EMBEDDED = (
    "no --model: this is the embedded default, 11 million parameters that learnt from Python's "
    "sources and manuals; it writes plausible Python and knows few facts"
)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The flags that decide what is loaded, and how."""

    model: str | None  # None: the embedded default
    device: str
    quant: str | None
    context: int | None
    threads: int | None
    max_batch: int | None = 1  # one person, one answer at a time; None: what a step can hold


def load_llm(options: LoadOptions, terminal: Terminal) -> LLM:
    """Load the model with progress bars; says so if it is the embedded default."""
    if options.model is None:
        terminal.note_once(EMBEDDED)
    llm = open_llm(options, terminal.progress)
    terminal.clear()
    return llm


def open_llm(options: LoadOptions, progress: Progress) -> LLM:
    """Load the model."""
    return LLM(
        options.model,
        device=options.device,
        max_batch=options.max_batch,
        context=options.context,
        quant=options.quant,
        threads=options.threads,
        progress=progress,
    )


def open_checkpoint(model: str | None) -> Checkpoint:
    """The checkpoint of a folder or hub id; None: the embedded default."""
    return Checkpoint.open(default_checkpoint(cache_dir()) if model is None else model)


def plan_of(options: LoadOptions) -> Plan:
    """The plan that `load_llm` would run; no weight is read."""
    checkpoint = open_checkpoint(options.model)
    spec = ModelSpec.from_hf(checkpoint.config, checkpoint.generation_config)
    weights = CheckpointWeights(checkpoint, spec)
    machine = machine_of(options.device, spec, options.threads)
    chosen = plan_options(spec, machine, options.quant or weights.dtype, options)
    return make_plan(spec, machine, chosen)


def plan_options(
    spec: ModelSpec, machine: Machine, weight_format: str, options: LoadOptions
) -> PlanOptions:
    """What the flags mean for the planner."""
    if options.quant is not None and options.quant not in QUANTS:
        raise UsageError(f"--quant takes {', '.join(QUANTS)}, not {options.quant!r}")
    return PlanOptions(
        format=weight_format,
        head_format=head_format(weight_format, machine.kind),
        context=options.context or min(longest_context(spec), DEFAULT_CONTEXT),
        max_batch=options.max_batch or machine.max_batch,
    )
