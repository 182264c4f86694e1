"""Reasoning apart from the answer: `<think> ... </think>`, wherever the stream is cut.

text as it comes -> `Reasoning` and `Content`, each without the white space at its borders.
"""

from flashformer.serve.protocol.pieces import Content, Piece, Reasoning
from flashformer.serve.protocol.tool_parsers import content, held_back

OPEN, CLOSE = "<think>", "</think>"
_SPACE = " \t\r\n"


class ReasoningParser:
    """Splits one answer; only a block at its start is reasoning."""

    def __init__(self, *, inside: bool) -> None:
        """`inside`: the prompt has opened the block already."""
        self._state = self._begin_inside if inside else self._at_start
        self._pending = ""

    @property
    def inside(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state in (self._begin_inside, self._inside)

    @property
    def undecided(self) -> bool:
        """Whether what came so far may still open the block."""
        return self._state == self._at_start

    def add(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""
        self._pending += text
        pieces: list[Piece] = []
        while self._pending:
            news = self._state()
            if news is None:
                break
            pieces += news
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, now that nothing follows."""
        rest, self._pending = self._pending, ""
        if self.inside:
            rest = rest.rstrip(_SPACE)
            return [Reasoning(rest)] if rest else []
        return content("" if self._state == self._behind else rest)

    def _at_start(self) -> list[Piece] | None:
        text = self._pending.lstrip(_SPACE)
        if text.startswith(OPEN):
            self._pending = text[len(OPEN) :]
            self._state = self._begin_inside
            return []
        if OPEN.startswith(text):
            return None
        self._state = self._outside
        return []

    def _begin_inside(self) -> list[Piece] | None:
        self._pending = self._pending.lstrip(_SPACE)
        if not self._pending:
            return None
        self._state = self._inside
        return []

    def _inside(self) -> list[Piece] | None:
        place = self._pending.find(CLOSE)
        if place >= 0:
            text = self._pending[:place].rstrip(_SPACE)
            self._pending = self._pending[place + len(CLOSE) :]
            self._state = self._behind
            return [Reasoning(text)] if text else []
        keep = held_back(self._pending, CLOSE)
        text = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(text) :]
        return [Reasoning(text)] if text else None

    def _behind(self) -> list[Piece] | None:
        self._pending = self._pending.lstrip(_SPACE)
        if not self._pending:
            return None
        self._state = self._outside
        return []

    def _outside(self) -> list[Piece] | None:
        text, self._pending = self._pending, ""
        return [Content(text)]
