"""Everything the command line writes that is not its answer: notes, errors and progress bars.

All of it goes to stderr, so that stdout holds the answer alone and can be piped.
"""

import json
import os
import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import TYPE_CHECKING, Self

from flashformer.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def open_streams() -> None:
    """Make text go in and out as UTF-8, whatever the locale; a closed stream is a null device.

    A stream that stayed closed would leave its number to the next file that is opened.
    """
    for name, mode, errors in (
        ("stdin", "r", "strict"),
        ("stdout", "w", "surrogateescape"),  # of paths that are no UTF-8
        ("stderr", "w", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def no_text(error: UnicodeDecodeError) -> UsageError:
    """What a user is told whose standard input is no text."""
    return UsageError(f"standard input is no UTF-8 text ({error.reason})")


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def write_json(value: object) -> None:
    """Print a value as one indented JSON document on stdout; NaN and infinity become null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def finite(value: object) -> object:
    """The same value, with numbers that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@dataclass(slots=True)
class Terminal:
    """Stderr as the user asked for it; a context manager that clears its bars on leaving.

    A bar is shown only where a person watches: on a terminal, without `--quiet` and `NO_COLOR`.
    Inside the context, Python's warnings are one line each.
    """

    quiet: bool = False
    _warnings: "AbstractContextManager[object]" = field(default_factory=warnings.catch_warnings)
    _told: set[str] = field(default_factory=set)
    _bars: "Progress | None" = None
    _tasks: "dict[str, TaskID]" = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        warnings.showwarning = lambda message, *_, **__: self.note(f"warning: {message}")
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._warnings.__exit__(None, None, None)

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars are drawn."""
        return not self.quiet and sys.stderr.isatty() and "NO_COLOR" not in os.environ

    def note(self, text: str) -> None:
        """Tell something that is worth a line, its columns as they are; nothing with `--quiet`."""
        if self.quiet:
            return
        self.clear()
        sys.stderr.write(" ".join(text.splitlines()) + "\n")
        sys.stderr.flush()

    def note_once(self, text: str) -> None:
        """Tell something that would be true again and again."""
        if text not in self._told:
            self._told.add(text)
            self.note(text)

    def progress(self, what: str, done: int, total: int) -> None:
        """Draw `done` of `total` of the job called `what`; the engine calls it while it loads."""
        if not self.shows_bars:
            return
        if self._bars is None:
            self._bars = _new_bars()
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=max(total, 1))
        self._bars.update(self._tasks[what], completed=done, total=max(total, 1))

    def clear(self) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


def _new_bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
