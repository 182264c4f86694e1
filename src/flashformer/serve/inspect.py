"""`flashformer inspect`: what a checkpoint is, and whether it can run here.

MODEL -> architecture, parameters, memory; or what is unsupported
"""

import sys
from dataclasses import asdict, dataclass
from math import prod
from typing import Annotated, Any

import typer

from flashformer.backends import machine_of
from flashformer.engine.llm import DEFAULT_CONTEXT
from flashformer.engine.memory import available_memory
from flashformer.errors import UnsupportedModelError
from flashformer.model.checkpoint import Checkpoint
from flashformer.model.roles import layer_roles, model_roles, role_shape
from flashformer.model.spec import ModelSpec
from flashformer.model.weights import CheckpointWeights
from flashformer.plan.plan import PlanOptions, make_plan
from flashformer.plan.planner import longest_context
from flashformer.quant.formats import head_format
from flashformer.quant.layout import quants_of
from flashformer.serve import options
from flashformer.serve.cache import size_text
from flashformer.serve.failure import EXIT_OK, EXIT_UNSUPPORTED
from flashformer.serve.load import open_checkpoint
from flashformer.serve.terminal import write_json

Spec = Annotated[bool, typer.Option("--spec", help="Print the whole ModelSpec instead.")]


@dataclass(frozen=True, slots=True)
class Memory:
    """What one weight format needs on this machine."""

    format: str
    weight_bytes: int
    kv_bytes_per_token: int
    bytes_at_context: int  # weights, and keys and values of one full sequence
    fits: bool | None  # None: the system does not tell what is available


def inspect_model(
    model: options.ModelArgument = None,
    spec: Spec = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Show the architecture, the parameters and the memory that MODEL needs. Reads no weights."""
    checkpoint = open_checkpoint(model)
    try:
        found = ModelSpec.from_hf(checkpoint.config, checkpoint.generation_config)
    except UnsupportedModelError as error:
        _write_unsupported(checkpoint, str(error), as_json)
        return EXIT_UNSUPPORTED
    if spec:
        _write_spec(found, as_json)
        return EXIT_OK
    report = describe(checkpoint, found, device)
    if as_json:
        write_json(report)
    else:
        sys.stdout.write("\n".join(_lines(report)) + "\n")
    return EXIT_OK


def describe(checkpoint: Checkpoint, spec: ModelSpec, device: str) -> dict[str, Any]:
    """Everything that `inspect --json` prints."""
    weights = CheckpointWeights(checkpoint, spec)
    context = min(longest_context(spec), DEFAULT_CONTEXT)
    layer = spec.layers[0]
    return {
        "folder": str(checkpoint.folder),
        "supported": True,
        "model_type": spec.model_type,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_q_heads": layer.num_q_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "vocab_size": spec.vocab_size,
        "rope": [rope.rope_type for rope in spec.ropes],
        "max_context": longest_context(spec),
        "tied_embeddings": spec.tie_word_embeddings,
        "tokenizer": (checkpoint.folder / "tokenizer.json").is_file(),
        "parameters": num_parameters(spec),
        "dtype": weights.dtype,
        "file_bytes": sum(file.size for file in checkpoint.files),
        "context": context,
        "available_bytes": available_memory(),
        "memory": [
            asdict(memory_of(spec, name, device, context))
            for name in (weights.dtype, *quants_of(machine_of(device, spec).layout))
        ],
    }


def memory_of(spec: ModelSpec, name: str, device: str, context: int) -> Memory:
    """What the model needs in one weight format, for one sequence."""
    machine = machine_of(device, spec)
    plan = make_plan(spec, machine, PlanOptions(name, head_format(name, machine.kind), context, 1))
    total = plan.image_bytes + context * plan.kv_bytes_per_token
    available = available_memory()
    fits = None if available is None else total <= available
    return Memory(name, plan.image_bytes, plan.kv_bytes_per_token, total, fits)


def num_parameters(spec: ModelSpec) -> int:
    """Numbers that the checkpoint stores for the model; a tied head counts once."""
    shapes = [role_shape(spec, role) for role in model_roles(spec)]
    for idx, layer in enumerate(spec.layers):
        shapes += [role_shape(spec, role, idx) for role in layer_roles(layer)]
    return sum(prod(shape) for shape in shapes)


def _write_unsupported(checkpoint: Checkpoint, reason: str, as_json: bool) -> None:
    model_type = checkpoint.config.get("model_type")
    if as_json:
        folder = str(checkpoint.folder)
        write_json(
            {"folder": folder, "supported": False, "model_type": model_type, "reason": reason}
        )
    else:
        sys.stdout.write(f"{model_type}: not supported\n{reason}\n")


def _write_spec(spec: ModelSpec, as_json: bool) -> None:
    if as_json:
        write_json(asdict(spec))
        return
    for name, value in asdict(spec).items():
        if name in ("layers", "ropes"):
            for idx, record in enumerate(value):
                fields = ", ".join(f"{key}={field!r}" for key, field in record.items())
                sys.stdout.write(f"{name}[{idx}]: {fields}\n")
        else:
            sys.stdout.write(f"{name}: {value!r}\n")


def _lines(report: dict[str, Any]) -> list[str]:
    heads = f"{report['num_q_heads']}:{report['num_kv_heads']} heads of {report['head_dim']}"
    lines = [
        f"{report['folder']}",
        f"  model       {report['model_type']}, {report['num_layers']} layers, hidden "
        f"{report['hidden_size']}, intermediate {report['intermediate_size']}, {heads}",
        f"  parameters  {report['parameters']:,}, stored as {report['dtype']} in "
        f"{size_text(report['file_bytes'])}",
        f"  vocabulary  {report['vocab_size']:,}"
        + (", tied to the head" if report["tied_embeddings"] else "")
        + ("" if report["tokenizer"] else ", no tokenizer.json: token ids only"),
        f"  positions   {report['max_context']:,}, rope {', '.join(report['rope']) or 'none'}",
        f"  memory at a context of {report['context']:,} tokens, one sequence:",
    ]
    for memory in report["memory"]:
        verdict = {True: "fits", False: "does not fit", None: ""}[memory["fits"]]
        lines.append(
            f"    {memory['format']:<9} {size_text(memory['bytes_at_context']):>10}  = "
            f"{size_text(memory['weight_bytes'])} of weights + "
            f"{size_text(memory['kv_bytes_per_token'])} a token  {verdict}".rstrip()
        )
    return lines
