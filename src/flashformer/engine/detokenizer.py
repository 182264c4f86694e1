"""Text of a growing sequence, piece by piece: the pieces joined are the decoding of all its tokens.

token ids one at a time -> text that no later token can change.
"""

import codecs
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

_PATIENCE = 16  # tokens after which an unfinished character is taken as it is


class Detokenizer(Protocol):
    """The state of one sequence's text."""

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        ...

    def finish(self) -> str:
        """The rest, now that no token follows."""
        ...


@cache
def byte_level_table() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (Radford et al. 2019).

    Printable bytes stand for themselves, the others for the characters from U+0100 on.
    """
    table = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    hidden = [b for b in range(256) if chr(b) not in table]
    return table | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(token: str) -> bytes:
    """Bytes of a token of byte-level BPE; an added token outside the table stands for itself."""
    table = byte_level_table()
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode("utf-8", "replace")


class ByteLevelDetokenizer:
    """For byte-level BPE: tokens are runs of bytes, a UTF-8 decoder holds back the unfinished."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters completed by this token."""
        return self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """U+FFFD for an unfinished character, if there is one."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decode the last tokens behind a few earlier ones.

    The difference is the new text. The earlier tokens keep decoders honest that treat the start of
    a text specially. While the last token is a byte of a byte-fallback run, nothing is certain: the
    whole run is valid UTF-8 or none of it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_silent: Callable[[int], bool],
        is_byte: Callable[[int], bool],
        *,
        hold_replacement: bool,
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent  # skipped special tokens, ids without a token
        self._is_byte = is_byte
        self._hold_replacement = hold_replacement
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text of the pending tokens and this one, once it is certain."""
        if self._is_silent(token_id):
            return ""
        self._pending.append(token_id)
        if self._is_byte(token_id):
            return ""
        return self._take(final=False)

    def finish(self) -> str:
        """The text of the tokens held back."""
        return self._take(final=True) if self._pending else ""

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._context) if self._context else ""
        text = self._decode(self._context + self._pending)[len(before) :]
        waiting = self._hold_replacement and text.endswith("\ufffd")
        if waiting and not final and len(self._pending) < _PATIENCE:
            return ""
        if text:
            self._context, self._pending = self._pending, []
        else:  # a stripped space, say: it must stay in sight of the next token
            self._context, self._pending = self._context + self._pending, []
        return text
