"""`flashformer compile`: everything that a first start does, ahead of time."""

import sys
import time
from contextlib import closing

from flashformer.serve import options
from flashformer.serve.cache import size_text
from flashformer.serve.load import LoadOptions, load_llm
from flashformer.serve.plan import Batch
from flashformer.serve.terminal import Terminal, write_json


def compile_model(
    model: options.ModelArgument = None,
    quant: options.Quant = None,
    context: options.Context = None,
    batch: Batch = 1,
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Pack the weights and compile the kernel of MODEL into the cache; the next start is quick."""
    started = time.perf_counter()
    with (
        Terminal(quiet=quiet) as terminal,
        closing(
            load_llm(LoadOptions(model, device, quant, context, threads, batch), terminal)
        ) as llm,
    ):
        plan = llm.plan
    seconds = time.perf_counter() - started
    if as_json:
        write_json(
            {
                "key": plan.key,
                "device": plan.machine.kind,
                "format": plan.options.format,
                "image_bytes": plan.image_bytes,
                "seconds": seconds,
            }
        )
    else:
        sys.stdout.write(
            f"{plan.spec.model_type} {plan.options.format} for {plan.machine.kind}: "
            f"{size_text(plan.image_bytes)} of weights, ready in {seconds:.1f} s\n"
        )
