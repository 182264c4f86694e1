"""What is kept of a file, and which files say nothing new."""

import hashlib
import re

MAX_LINE = 160  # characters; longer lines are data
MIN_LETTERS = 0.5  # share of letters and spaces in a file; less is a table of numbers
MAX_SEEN = 0.5  # share of a file's long lines that earlier files may hold
LONG_LINE = 24  # characters; shorter lines (`return self`) repeat for good reasons
HEADER = re.compile(r"\A(?:#[^\n]*\n|\s*\n)+")
BLANK_LINES = re.compile(r"\n{4,}")
HELD_OUT_ONE_IN = 40


def clean(text: str) -> str:
    """Unix line ends, no trailing spaces, no licence header, at most two blank lines in a row."""
    text = text.replace("\r\n", "\n").replace("\ufeff", "").expandtabs(4)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    header = HEADER.match(text)
    if header and re.search("copyright|licen[sc]e|coding[:=]|#!", header.group(), re.IGNORECASE):
        text = text[header.end() :]
    return BLANK_LINES.sub("\n\n\n", text).strip("\n") + "\n"


def is_prose_or_code(text: str) -> bool:
    """Whether people wrote this to be read: few very long lines, mostly letters."""
    lines = text.split("\n")
    if sum(len(line) > MAX_LINE for line in lines) > 0.02 * len(lines):
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return letters > MIN_LETTERS * len(text) and "\0" not in text


class Seen:
    """Remembers lines, to tell a file that repeats earlier ones."""

    def __init__(self) -> None:
        self._lines: set[bytes] = set()

    def repeats(self, text: str) -> bool:
        """Whether most long lines of `text` were seen before; remembers them if not."""
        long_lines = [line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_LINE]
        hashes = {hashlib.blake2b(line.encode(), digest_size=8).digest() for line in long_lines}
        if len(hashes & self._lines) > MAX_SEEN * len(hashes):
            return True
        self._lines |= hashes
        return False


def is_held_out(path: str) -> bool:
    """Whether a file is for measuring only: decided by its name, so that it stays so."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
