"""The part of a page that a program writes: what stands between two marks."""

import argparse
from collections.abc import Callable
from pathlib import Path

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def between_marks(page: str, text: str) -> str:
    """The page with the text between the two marks replaced."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{text}{END}{after}"


def rewrite(document: Path, made: Callable[[str], str], description: str | None) -> None:
    """Rewrite the page, or with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    arguments = parser.parse_args()
    old = document.read_text()
    new = made(old)
    if arguments.check:
        raise SystemExit(int(new != old))
    document.write_text(new)
