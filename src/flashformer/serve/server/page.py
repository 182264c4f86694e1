"""The page at `/`: one document that needs nothing else, and a policy that allows nothing else.

`serve/page/*` -> `Document`
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "page"
# In the order in which they are joined to one script.
SCRIPTS = (
    "base.js",
    "server.js",
    "settings.js",
    "answer.js",
    "turn.js",
    "columns.js",
    "machine.js",
    "main.js",
)
_PLACE = re.compile(r"<(style|script)( [^>]*)?></\1>")  # empty elements, filled here


@dataclass(frozen=True, slots=True)
class Document:
    """What a browser gets."""

    content: bytes
    headers: Sequence[tuple[bytes, bytes]]


@lru_cache(maxsize=1)
def document() -> Document:
    """The page with its style and script inside; the policy names both by their hashes."""
    parts = {
        "style": _read("style.css"),
        "script": "\n".join(_read(name) for name in SCRIPTS),
    }
    text = _PLACE.sub(
        lambda place: f"<{place[1]}{place[2] or ''}>{parts[place[1]]}</{place[1]}>",
        _read("index.html"),
    )
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "connect-src 'self'; img-src data:; "
        f"script-src {_source(parts['script'])}; style-src {_source(parts['style'])}; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"cache-control", b"no-cache"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
    ]
    return Document(text.encode(), headers)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """What allows an inline element with exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
