"""What was measured, as rows, and the rows as a table.

`Measured` + `Plan` -> `Row`s -> md | csv | json | jsonl
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from flashformer.plan.plan import Plan
from flashformer.serve.benchmark.cases import Case
from flashformer.serve.benchmark.measure import Measured

OUTPUTS = ("md", "json", "csv", "jsonl")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; the numbers are medians over the samples."""

    test: str  # pp128 | tg128
    depth: int  # positions that every sequence held before
    batch: int  # sequences in a step
    format: str  # of the weights
    tok_s: float  # tokens of all sequences a second
    tok_s_spread: float  # half of (largest - smallest) sample
    ms_per_step: float  # a step is one token of every sequence, or one chunk of a prompt
    bytes_per_step: int  # from the plan: weights once, keys and values of every sequence
    gb_s: float  # bytes_per_step / time, in 10^9 bytes a second
    share: float  # gb_s / the machine's read_gb_s
    samples: list[float]  # tok/s of every round


def make_row(case: Case, plan: Plan, measured: Measured) -> Row:
    """The row of a case."""
    samples = [case.tokens * case.batch / s for s in measured.seconds[case]]
    steps, bytes_per_step = _steps(case, plan)
    seconds_per_step = median(measured.seconds[case]) / steps
    gb_s = bytes_per_step / seconds_per_step / 1e9
    return Row(
        test=case.test,
        depth=case.depth,
        batch=case.batch,
        format=plan.options.format,
        tok_s=median(samples),
        tok_s_spread=(max(samples) - min(samples)) / 2,
        ms_per_step=seconds_per_step * 1e3,
        bytes_per_step=bytes_per_step,
        gb_s=gb_s,
        share=gb_s / median(measured.read_gb_s),
        samples=samples,
    )


def _steps(case: Case, plan: Plan) -> tuple[int, int]:
    """How many steps a case takes, and the bytes of the mean one."""
    if case.kind == "pp":
        ends = [0]
        while ends[-1] < case.tokens:
            chunk = plan.machine.chunk_rows(case.depth + ends[-1])
            ends.append(min(case.tokens, ends[-1] + chunk))
        ends = ends[1:]
    else:
        ends = list(range(1, case.tokens + 1))
    total = sum(plan.bytes_per_step(case.depth + end, case.batch) for end in ends)
    return len(ends), total // len(ends)


def table(rows: Sequence[Row], model: str, size: int, parameters: int, backend: str) -> str:
    """A markdown table with llama-bench's columns first."""
    lines = [
        "| model | size | params | backend | test | tok/s | ms/step | GB/s | share |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        batch = f" b{row.batch}" if row.batch > 1 else ""
        depth = f" @ d{row.depth}" if row.depth else ""
        cells = (
            f"{model} {row.format}",
            f"{size / 2**30:.2f} GiB",
            f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M",
            backend,
            f"{row.test}{batch}{depth}",
            f"{row.tok_s:.2f} ± {row.tok_s_spread:.2f}",
            f"{row.ms_per_step:.2f}",
            f"{row.gb_s:.2f}",
            f"{row.share:.0%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header; samples are separated by spaces."""
    out = io.StringIO()
    names = list(Row.__dataclass_fields__)
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "samples": " ".join(f"{s:.4f}" for s in row.samples)})
    return out.getvalue().rstrip("\n")


def jsonl_text(rows: Sequence[Row]) -> str:
    """One JSON object a line."""
    return "\n".join(json.dumps(asdict(row)) for row in rows)
