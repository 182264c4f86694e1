"""`flashformer doctor`: what this machine has, what is missing, and how to mend it.

-> one line a finding: ok, warn or fail
"""

import sys
from typing import Annotated

import typer

from flashformer.backends import gpu_bandwidth, gpu_fit
from flashformer.errors import FlashFormerError
from flashformer.serve import options
from flashformer.serve.bench import Shape
from flashformer.serve.benchmark.run import Model, find_model
from flashformer.serve.cache import size_text
from flashformer.serve.failure import EXIT_OK, EXIT_RUNTIME
from flashformer.serve.findings import Finding, all_findings
from flashformer.serve.plan import Batch
from flashformer.serve.terminal import write_json

Bench = Annotated[
    bool, typer.Option("--bench", help="Compile and run a kernel that reads the GPU's memory.")
]


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Say what of this model would fit the GPU."),
    ] = None,
    model_shape: Shape = None,
    batch: Batch = 1,
    bench: Bench = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Check Python, compiler, processor, memory, cache, GPU; exit code 0 if the CPU path runs."""
    findings = all_findings()
    if model is not None or model_shape is not None:
        findings.append(fit(find_model(model, model_shape), batch))
    if bench:
        findings.append(bandwidth())
    ready = not any(finding.level == "fail" for finding in findings)
    if as_json:
        write_json({"ready": ready, "findings": [finding.to_json() for finding in findings]})
    else:
        for finding in findings:
            sys.stdout.write(_line(finding) + "\n")
    return EXIT_OK if ready else EXIT_RUNTIME


def fit(model: Model, batch: int) -> Finding:
    """The longest context of a model that the GPU's free memory holds."""
    try:
        found = gpu_fit(model.spec, model.stored_format, batch)
    except FlashFormerError as error:
        return Finding("fit", "warn", f"{model.name}: {error}")
    detail = (
        f"{model.name} in {found.format}: {size_text(found.weights)} of weights, "
        f"{size_text(found.past_bytes_per_token)} a position; {size_text(found.free)} are free"
    )
    if not found.context:
        return Finding("fit", "warn", f"{detail}: does not fit", "use a smaller model")
    detail += f": batch {batch} fits with a context of up to {found.context:,} tokens"
    return Finding("fit", "ok", detail)


def bandwidth() -> Finding:
    """What the decoder's own ring reads a second: the limit of every token."""
    try:
        found = gpu_bandwidth()
    except FlashFormerError as error:
        return Finding("bandwidth", "warn", str(error))
    return Finding("bandwidth", "ok", f"{found:.0f} GB/s through the kernel's ring, measured now")


def _line(finding: Finding) -> str:
    cure = f"; {finding.cure}" if finding.cure else ""
    return f"{finding.level:<4}  {finding.subject:<10} {finding.detail}{cure}"
