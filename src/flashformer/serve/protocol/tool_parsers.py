"""Tool calls in a growing text, in the formats of the families.

text as it comes -> `Content`, `CallBegin`, `CallArguments`. The pieces together do not depend on
where the text is cut. What looks like a call and is none stays text.
"""

import re
from collections.abc import Iterable
from typing import Protocol

from flashformer.serve.protocol.incremental import SPACE, Incremental, State, content
from flashformer.serve.protocol.pieces import Piece
from flashformer.serve.protocol.scanner import MAX_NAME, CallScanner

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
MISTRAL_OPEN = "[TOOL_CALLS]"
LLAMA_OPEN = "<|python_tag|>"
_MISTRAL_NAME = re.compile(r"([\w.:-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?")
_LONGEST_HEAD = MAX_NAME + 64  # of a call in Mistral's later format, before its arguments


class ToolParser(Protocol):
    """The state of one answer."""

    def add(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """The rest, now that nothing follows."""
        ...


class _Parser(Incremental):
    """Common to all formats: the call that is being read, and what stood before it."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._scanner: CallScanner | None = None
        self._count = 0
        self._head = ""  # what stood before the call, in case it is none

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        scanner, self._scanner = self._scanner, None
        rest = self._take_rest()
        if scanner is None:
            return content(rest if self._keeps_rest() else "")
        return [] if scanner.begun else content(self._head + scanner.raw + rest)

    def _keeps_rest(self) -> bool:
        return True

    def _begin_call(self, head: str, names: frozenset[str] | None = None) -> None:
        self._head = head
        self._scanner = CallScanner(self._count, names)

    def _read_call(self, behind: State, text: State) -> list[Piece]:
        """Feed the scanner; at its end go on `behind` the call, or as `text` if it is none."""
        scanner = self._scanner
        assert scanner is not None
        pieces: list[Piece] = []
        place = 0
        while place < len(self._pending) and not scanner.ended:
            pieces += scanner.feed(self._pending[place])
            place += 1
        self._pending = self._pending[place:]
        if not scanner.ended:
            return pieces
        self._scanner = None
        if scanner.begun:
            self._count += 1
            self._state = behind
            return pieces
        self._state = text
        return pieces + content(self._head + scanner.raw)


class HermesParser(_Parser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen and many others."""

    def __init__(self) -> None:
        super().__init__(self._in_text)

    def _in_text(self) -> list[Piece] | None:
        text, begins = self._take_until(HERMES_OPEN)
        if not begins:
            return content(text) or None
        self._begin_call(HERMES_OPEN)
        self._state = self._in_call
        return content(text)

    def _in_call(self) -> list[Piece] | None:
        return self._read_call(self._behind_call, self._in_text)

    def _behind_call(self) -> list[Piece] | None:
        if not self._drop_space():
            return None
        if HERMES_CLOSE.startswith(self._pending) and self._pending != HERMES_CLOSE:
            return None
        self._pending = self._pending.removeprefix(HERMES_CLOSE)
        self._state = self._between
        return []

    def _between(self) -> list[Piece] | None:
        if not self._drop_space():
            return None
        self._state = self._in_text
        return []

    def _keeps_rest(self) -> bool:
        return self._state != self._behind_call


class LlamaParser(_Parser):
    """`{"name": ..., "parameters": {...}}`, perhaps several behind `;`, as the whole answer.

    Only objects that name a function of the request are calls; any other text is text.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(self._at_start)
        self._names = frozenset(names)

    def _at_start(self) -> list[Piece] | None:
        text = self._pending.lstrip(SPACE)
        if not text or (LLAMA_OPEN.startswith(text) and text != LLAMA_OPEN):
            return None
        if text.startswith(LLAMA_OPEN):
            self._pending = text[len(LLAMA_OPEN) :]
            self._state = self._behind_tag
            return []
        return self._call_or_text()

    def _behind_tag(self) -> list[Piece] | None:
        return self._call_or_text() if self._pending.lstrip(SPACE) else None

    def _call_or_text(self) -> list[Piece] | None:
        text = self._pending.lstrip(SPACE)
        if not text.startswith("{"):
            self._state = self._in_text
            return []
        self._begin_call(self._pending[: len(self._pending) - len(text)], self._names)
        self._pending = text
        self._state = self._in_call
        return []

    def _in_call(self) -> list[Piece] | None:
        return self._read_call(self._between, self._in_text)

    def _between(self) -> list[Piece] | None:
        text = self._pending.lstrip(SPACE + ";")
        if not text:
            return None
        self._pending = text
        return self._call_or_text()

    def _in_text(self) -> list[Piece] | None:
        return content(self._take_rest())

    def _keeps_rest(self) -> bool:
        return self._state != self._between


class MistralParser(_Parser):
    """`[TOOL_CALLS][{"name": ..., "arguments": ...}]`, or `[TOOL_CALLS]name{...}` for each call."""

    def __init__(self, *, inside: bool = False) -> None:
        """`inside`: the text begins behind the tag."""
        super().__init__(self._behind_tag if inside else self._in_text)
        self._tag = "" if inside else MISTRAL_OPEN

    def _in_text(self) -> list[Piece] | None:
        text, begins = self._take_until(MISTRAL_OPEN)
        if not begins:
            return content(text) or None
        self._tag = MISTRAL_OPEN
        self._state = self._behind_tag
        return content(text)

    def _behind_tag(self) -> list[Piece] | None:
        if not self._drop_space():
            return None
        if self._pending.startswith("["):
            self._pending = self._pending[1:]
            self._state = self._in_array
            return []
        return self._named_call()

    def _named_call(self) -> list[Piece] | None:
        match = _MISTRAL_NAME.match(self._pending)
        end = match.end() if match else 0
        rest = self._pending[end:]
        if match and rest.startswith("{") and len(match[1]) <= MAX_NAME:
            self._head = self._tag
            self._scanner = CallScanner.named(self._count, match[1], self._pending[:end])
            self._pending = rest
            self._state = self._in_named_call
            return []
        unsure = not rest or "[ARGS]".startswith(rest) or "[CALL_ID]".startswith(rest)
        if match and unsure and len(self._pending) < _LONGEST_HEAD:
            return None
        text, self._pending = self._tag + self._pending[: end + 1], self._pending[end + 1 :]
        self._state = self._in_text
        return content(text)

    def _in_named_call(self) -> list[Piece] | None:
        return self._read_call(self._between, self._in_text)

    def _between(self) -> list[Piece] | None:
        if not self._drop_space():
            return None
        self._state = self._in_text
        return []

    def _in_array(self) -> list[Piece] | None:
        self._pending = self._pending.lstrip(SPACE + ",")
        if not self._pending:
            return None
        if self._pending[0] == "]":
            self._pending = self._pending[1:]
            self._state = self._between
            return []
        self._begin_call(self._tag + "[" if not self._count else "")
        self._state = self._in_element
        return []

    def _in_element(self) -> list[Piece] | None:
        return self._read_call(self._in_array, self._in_text)

    def finish(self) -> list[Piece]:
        """See `ToolParser`."""
        if self._state == self._behind_tag:  # a tag, and no call behind it
            self._pending = self._tag + self._pending
        return super().finish()

    def _keeps_rest(self) -> bool:
        return self._state != self._in_array
