"""The first run of the embedded model: an answer at once, and the kernel is compiled after it.

Compiling takes seconds and happens once. The embedded model is small enough for the reference
backend, so that nobody waits for their first line, or needs a compiler for it.
"""

import subprocess
import sys
from dataclasses import dataclass, replace

from flashformer.errors import CompileError
from flashformer.serve.load import LoadOptions, plan_of
from flashformer.serve.terminal import Terminal

NOT_YET = (
    "this first answer comes from the slow reference backend; the CPU kernel is compiled after it, "
    "once, in the background"
)


@dataclass(frozen=True, slots=True)
class Start:
    """How a run starts."""

    options: LoadOptions  # what to load
    kernel_is_missing: bool = False  # and can be compiled when the answer is there


def quick_start(options: LoadOptions, terminal: Terminal) -> Start:
    """The options as they are, or the reference device where the embedded model has no kernel yet.

    Only for `--device auto` without a GPU; a note says what happens.
    """
    if options.model is not None or options.device != "auto":
        return Start(options)
    plan = plan_of(options)
    if plan.machine.kind != "cpu":
        return Start(options)
    from threadpoolctl import threadpool_limits

    from flashformer.backends.cpu.compile import kernel_is_ready

    can_compile = True
    try:
        if kernel_is_ready(plan):
            return Start(options)
        terminal.note(NOT_YET)
    except CompileError as error:
        terminal.note(f"the slow reference backend answers. {error}")
        can_compile = False
    # More threads make products of this size no faster, and beside other work several times slower.
    threadpool_limits(1, user_api="blas")
    return Start(replace(options, device="reference"), kernel_is_missing=can_compile)


def compile_in_background(options: LoadOptions) -> None:
    """Start `flashformer compile` for the same plan; it outlives this process and says nothing."""
    flags = {"--quant": options.quant, "--context": options.context, "--threads": options.threads}
    given = [str(part) for flag, value in flags.items() if value for part in (flag, value)]
    subprocess.Popen(
        [sys.executable, "-m", "flashformer", "compile", "--device", "cpu", "--quiet", *given],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
