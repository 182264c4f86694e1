"""`flashformer eval`: what each weight format costs in quality, on a text that is held out.

MODEL, text -> perplexity a format
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashformer.engine.likelihood import Likelihood, measure_likelihood
from flashformer.errors import UsageError
from flashformer.model.default import HELD_OUT
from flashformer.quant.formats import QUANTS
from flashformer.serve import options
from flashformer.serve.benchmark.provenance import provenance, system
from flashformer.serve.load import LoadOptions, load_llm
from flashformer.serve.terminal import Terminal, write_json

STORED = "stored"
FORMATS = ",".join((STORED, "int8", "int4", "int4g128"))  # that every device has
DEFAULT_WINDOW = 512

Text = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text to score. Default: one that the embedded model has not seen."),
]
Formats = Annotated[
    str,
    typer.Option(
        "--quant",
        help="Formats to compare, separated by commas; stored means as in the checkpoint.",
    ),
]
Window = Annotated[
    int, typer.Option(min=2, help="Tokens that are read together; at most the model's context.")
]


@dataclass(frozen=True, slots=True)
class Row:
    """One weight format's result."""

    format: str
    bytes_per_token: int  # of weights
    likelihood: Likelihood
    same_choice: float  # share of positions where the most probable token is that of the first row

    def to_json(self) -> dict[str, Any]:
        """The numbers, not rounded."""
        return {
            "format": self.format,
            "bytes_per_token": self.bytes_per_token,
            "nats_per_token": self.likelihood.nats_per_token,
            "perplexity": self.likelihood.perplexity,
            "bits_per_byte": self.likelihood.bits_per_byte,
            "same_choice": self.same_choice,
        }


def evaluate(
    model: options.ModelArgument = None,
    text: Text = None,
    quant: Formats = FORMATS,
    window: Window = DEFAULT_WINDOW,
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure the perplexity of a text in every weight format of MODEL."""
    source = HELD_OUT if text is None else text
    content = _read(source)
    rows: list[Row] = []
    with Terminal(quiet=quiet) as terminal:
        for name in _formats(quant):
            stored_as = None if name == STORED else name
            loaded = LoadOptions(model, device, stored_as, window, threads)
            rows.append(_measure(loaded, content, window, rows[:1], terminal))
    if as_json:
        write_json(
            {
                "kind": "quality",
                "model": model or "embedded default",
                "text": {"name": source.name, "bytes": len(content.encode()), "window": window},
                "tokens": len(rows[0].likelihood.losses),
                "formats": [row.to_json() for row in rows],
                "machine": system(),
                **provenance(),
            }
        )
    else:
        sys.stdout.write(_table(rows))


def _measure(
    loaded: LoadOptions, text: str, window: int, first: list[Row], terminal: Terminal
) -> Row:
    with closing(load_llm(loaded, terminal)) as llm:
        found = measure_likelihood(llm, text, window)
        reference = first[0].likelihood if first else found
        same = float(np.mean(found.choices == reference.choices))
        return Row(llm.plan.options.format, llm.plan.bytes_per_step(0), found, same)


def _formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in (STORED, *QUANTS):
            known = ", ".join((STORED, *QUANTS))
            raise UsageError(f"--quant takes {known}, separated by commas, not {name!r}")
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path} is no UTF-8 text: {error.reason}") from error


def _table(rows: list[Row]) -> str:
    lines = [f"{'format':<10}{'MB/token':>10}{'perplexity':>12}{'nats/token':>12}"]
    lines[0] += f"{'bits/byte':>11}{'same choice':>13}"
    for row in rows:
        found = row.likelihood
        lines.append(
            f"{row.format:<10}{row.bytes_per_token / 1e6:>10.2f}{found.perplexity:>12.3f}"
            f"{found.nats_per_token:>12.4f}{found.bits_per_byte:>11.4f}{row.same_choice:>12.1%}"
        )
    return "\n".join(lines) + "\n"
