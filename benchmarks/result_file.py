"""How the result files of the measuring scripts begin, are named and are written."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashformer.serve.benchmark.provenance import provenance, system

RESULTS = Path(__file__).parent / "results"


def begin(kind: str, commit: str | None = None) -> dict[str, Any]:
    """A result that says what it is, where its numbers come from and what machine they are of."""
    return {"schema": 1, "kind": kind, **provenance(commit), "system": system()}


def new_path(hardware: str, what: str) -> Path:
    """Time, hardware and subject: what tells result files apart."""
    words = hardware.replace("(R)", "").lower().split()[:4]
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d-%H%M}-{'-'.join(words)}-{what}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result; the file is whole at any time, also one that is written again and again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)
