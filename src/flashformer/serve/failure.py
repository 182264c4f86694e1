"""Turns any exception into one sentence and an exit code.

exception -> `Failure`; the table of codes is in `docs/command-line.md`.
"""

import errno
import sys
from dataclasses import dataclass

from flashformer.errors import FlashFormerError
from flashformer.serve.terminal import one_line, write_json

EXIT_OK = 0
EXIT_RUNTIME = 1
EXIT_USAGE = 2
EXIT_UNSUPPORTED = 3
EXIT_MEMORY = 4
EXIT_INTERRUPTED = 130

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Failure:
    """What the user is told, and what the shell sees."""

    kind: str  # name of the error's class, for programs
    message: str  # one sentence
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """The failure that an exception means."""
    kind = type(error).__name__
    if isinstance(error, FlashFormerError):
        return Failure(kind, one_line(str(error)), error.exit_code)
    if hasattr(error, "format_message"):  # the parser's own errors, whichever library raised them
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "flashformer"
        message = one_line(error.format_message()).rstrip(".")
        cure = f"{' See' if message.endswith('?') else '; see'} `{command} --help`"
        return Failure("UsageError", message + cure, EXIT_USAGE)
    if isinstance(error, MemoryError):
        message = "out of memory; use a smaller --context or a smaller --quant format"
        return Failure("OutOfMemoryError", message, EXIT_MEMORY)
    if isinstance(error, OSError):
        return Failure(kind, _os_message(error), EXIT_RUNTIME)
    message = (
        f"internal error, {kind}: {one_line(str(error))}; run again with --debug and report it"
    )
    return Failure(kind, message, EXIT_RUNTIME)


def report(failure: Failure, as_json: bool) -> None:
    """Print the failure: one line on stderr, or a JSON document on stdout."""
    if as_json:
        error = {"type": failure.kind, "message": failure.message, "code": failure.exit_code}
        write_json({"error": error})
    else:
        sys.stdout.flush()  # before the error, as it happened
        sys.stderr.write(f"error: {failure.message}\n")


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _FULL_DISK:
        return (
            f"{where or 'standard output: '}the disk is full ({error.strerror}); free some space, "
            "or set FLASHFORMER_CACHE_DIR to a folder on another disk"
        )
    return f"{where}{error.strerror or one_line(str(error))}"
