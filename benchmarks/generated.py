"""What the writers of tables share: reading results, and the part of a page between two marks."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every result file with its name; the names, which begin with a date, give the order."""
    paths = sorted(folder.glob("*.json"))
    return [{**json.loads(path.read_text()), "file": path.name} for path in paths]


def between_marks(page: str, text: str) -> str:
    """The page with the text between the two marks replaced."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{text}{END}{after}"


def rewrite(made: Mapping[Path, str], description: str | None) -> None:
    """Rewrite the files, or with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    if parser.parse_args().check:
        raise SystemExit(any(not p.exists() or p.read_text() != t for p, t in made.items()))
    for path, text in made.items():
        path.write_text(text)
