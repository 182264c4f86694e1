"""Runs the command line for tests: in this process, or in one of its own."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashformer.serve.cli import execute


@dataclass(frozen=True)
class Ended:
    """What a command line left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def error(self, code: int) -> str:
        """The sentence of an error, after checking its form."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0].removeprefix("error: ")


class CommandLine:
    """`cli("run", "hello")`, with output captured."""

    def __init__(self, capsys: Any, monkeypatch: Any, cache: Path) -> None:
        self._capsys, self._monkeypatch, self.cache = capsys, monkeypatch, cache
        monkeypatch.setenv("FLASHFORMER_CACHE_DIR", str(cache))

    def __call__(self, *argv: object, stdin: str = "") -> Ended:
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = execute([str(argument) for argument in argv])
        captured = self._capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    def environment(self, **changes: str) -> dict[str, str]:
        return {**os.environ, **changes}

    def process(self, *argv: object, stdin: str = "", **options: Any) -> Ended:
        """The same in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "flashformer", *(str(argument) for argument in argv)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )
        return Ended(done.returncode, done.stdout, done.stderr)
