"""What parsers of a growing text share: text that waits, and the states that consume it.

text as it comes -> `Piece`s, the same ones wherever the text is cut
"""

from collections.abc import Callable

from flashformer.serve.protocol.pieces import Content, Piece

SPACE = " \t\r\n"
State = Callable[[], list[Piece] | None]  # consumes what waits; None: it needs more


class Incremental:
    """A state machine over the text of one answer."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._pending = ""

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

    def _drop_space(self) -> bool:
        """Whether there is anything but white space."""
        self._pending = self._pending.lstrip(SPACE)
        return bool(self._pending)

    def _take_rest(self) -> str:
        rest, self._pending = self._pending, ""
        return rest

    def _take_until(self, tag: str) -> tuple[str, bool]:
        """What is certain to stand before `tag`, without the white space at it; whether it came."""
        text, found, behind = self._pending.partition(tag)
        if found:
            self._pending = behind
            return text.rstrip(SPACE), True
        certain = len(text) - _held_back(text, tag)
        self._pending = text[certain:]
        return text[:certain], False


def content(text: str) -> list[Piece]:
    """A piece, unless it would be empty."""
    return [Content(text)] if text else []


def _held_back(text: str, tag: str) -> int:
    """Length of the end of `text` that may start `tag`, with the white space before it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[len(text) - length :]):
            break
    else:
        length = 0
    return len(text) - len(text[: len(text) - length].rstrip(SPACE))
