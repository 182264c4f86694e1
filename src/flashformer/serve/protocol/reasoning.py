"""Reasoning apart from the answer: `<think> ... </think>`, wherever the stream is cut.

text as it comes -> `Reasoning` and `Content`, each without the white space at its borders.
"""

from flashformer.serve.protocol.incremental import SPACE, Incremental, content
from flashformer.serve.protocol.pieces import Content, Piece, Reasoning

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser(Incremental):
    """Splits one answer; only a block at its start is reasoning."""

    def __init__(self, *, inside: bool) -> None:
        """`inside`: the prompt has opened the block already."""
        super().__init__(self._begin_inside if inside else self._at_start)

    @property
    def inside(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state in (self._begin_inside, self._inside)

    @property
    def undecided(self) -> bool:
        """Whether what came so far may still open the block."""
        return self._state == self._at_start

    def finish(self) -> list[Piece]:
        """The rest, now that nothing follows."""
        rest = self._take_rest()
        if self.inside:
            return _reasoning(rest.rstrip(SPACE))
        return content("" if self._state == self._behind else rest)

    def _at_start(self) -> list[Piece] | None:
        text = self._pending.lstrip(SPACE)
        if text.startswith(OPEN):
            self._pending = text[len(OPEN) :]
            self._state = self._begin_inside
            return []
        if OPEN.startswith(text):
            return None
        self._state = self._outside
        return []

    def _begin_inside(self) -> list[Piece] | None:
        if not self._drop_space():
            return None
        self._state = self._inside
        return []

    def _inside(self) -> list[Piece] | None:
        text, ended = self._take_until(CLOSE)
        if ended:
            self._state = self._behind
            return _reasoning(text)
        return _reasoning(text) or None

    def _behind(self) -> list[Piece] | None:
        if not self._drop_space():
            return None
        self._state = self._outside
        return []

    def _outside(self) -> list[Piece] | None:
        return [Content(self._take_rest())]


def _reasoning(text: str) -> list[Piece]:
    return [Reasoning(text)] if text else []
