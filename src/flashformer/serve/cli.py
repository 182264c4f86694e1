"""The command line: reads the arguments, calls one verb, ends with one exit code.

argv -> exit code
"""

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated

import typer

from flashformer import __version__
from flashformer.serve.failure import EXIT_INTERRUPTED, EXIT_OK, failure_of, report
from flashformer.serve.terminal import Terminal, open_streams

VERBS = {  # verb -> (module of this package, its function or the app of its own verbs)
    "run": ("run", "run"),
    "chat": ("chat", "chat"),
    "serve": ("serve", "serve"),
    "inspect": ("inspect", "inspect_model"),
    "plan": ("plan", "show_plan"),
    "compile": ("compile", "compile_model"),
    "bench": ("bench", "bench"),
    "profile": ("profile", "profile"),
    "eval": ("evaluate", "evaluate"),
    "doctor": ("doctor", "doctor"),
    "cache": ("cache", "cache_app"),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"flashformer {__version__}\n")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def command_line(verbs: Iterable[str]) -> typer.Typer:
    """The parser of these verbs; the modules of all others are not imported, which takes time."""
    app = typer.Typer(
        name="flashformer",
        help="Whole-model kernels for low-batch LLM decoding.",
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for verb in verbs:
        module, name = VERBS[verb]
        found = getattr(import_module(f"flashformer.serve.{module}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb)
        else:
            app.command(verb)(found)
    return app


def execute(argv: Sequence[str]) -> int:
    """Run one command line; the answer goes to stdout, everything else to stderr.

    Every error becomes one line (`error: ...`), or `{"error": {...}}` on stdout with `--json`;
    a traceback is shown with `--debug` alone. A reader that closes the pipe is no error.
    """
    try:
        # A line that names no verb gets help, or an error: both know all of them.
        app = command_line([verb for verb in argv[:1] if verb in VERBS] or VERBS)
        code = app(args=list(argv), prog_name="flashformer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as leaving:
        # The parser turns a closed pipe, and nothing else, into this.
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        _drop_stdout()
        return EXIT_OK
    except BrokenPipeError:
        _drop_stdout()
        return EXIT_OK
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        failure = failure_of(error)
        try:
            report(failure, as_json="--json" in argv)
        except OSError:  # stdout itself is what failed
            _drop_stdout()
            report(failure, as_json=False)
        return failure.exit_code


def _drop_stdout() -> None:
    """Send what is left to nowhere: the interpreter flushes once more at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def main() -> None:
    """Entry point of the `flashformer` script."""
    open_streams()
    if not Terminal(quiet="--quiet" in sys.argv or "-q" in sys.argv).shows_bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(execute(sys.argv[1:]))
