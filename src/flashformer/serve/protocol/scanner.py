"""Tool calls as a model writes them: one JSON object, read character by character.

`{"name": "f", "arguments": {...}}` -> the name, then the arguments as they come.
"""

import json

from flashformer.serve.protocol.pieces import CallArguments, CallBegin, Piece

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
MAX_NAME = 128  # characters of a function's name


class CallScanner:
    """Reads one call. It ends with `done` or `failed`.

    A call begins when its name is known; its arguments are the model's own text, whatever comes
    between the braces. Arguments that are not an object are told when they are complete.
    """

    def __init__(self, index: int, names: frozenset[str] | None = None) -> None:
        """`names`: the functions that exist, where other text may look like a call."""
        self._read: list[str] = []
        self.done = False
        self.failed = False
        self.begun = False
        self._index = index
        self._names = names
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._key: str | None = None
        self._expect = "{"  # what must come next at depth 1: { key : value ,
        self._value = ""
        self._name: str | None = None
        self._arguments = ""  # not told yet
        self._has_arguments = False
        self._is_named = False  # its arguments are all that comes

    @classmethod
    def named(cls, index: int, name: str, head: str) -> "CallScanner":
        """A call whose name was written before its arguments, as `head`."""
        scanner = cls(index)
        for character in f'{{"name": {json.dumps(name)}, "arguments": ':
            scanner.feed(character)
        scanner._read = [head]
        scanner._is_named = True
        return scanner

    @property
    def ended(self) -> bool:
        """Whether nothing more belongs to the call."""
        return self.done or self.failed

    @property
    def raw(self) -> str:
        """All that has been read."""
        return "".join(self._read)

    def feed(self, character: str) -> list[Piece]:
        """Take the next character; the news."""
        self._read.append(character)
        if self._in_string or self._depth > 1:
            self._inner(character)
        else:
            self._outer(character)
        if self._is_named and self._depth == 1 and self._expect == ",":  # the value has ended
            self._end_object()
        return self._news()

    def _news(self) -> list[Piece]:
        news: list[Piece] = []
        if self._name is None or self.failed:
            return news
        if not self.begun and (self._has_arguments or self.done):
            self.begun = True
            news.append(CallBegin(self._index, self._name))
        if self.begun and self._arguments:
            news.append(CallArguments(self._index, self._arguments))
            self._arguments = ""
        return news

    def _inner(self, character: str) -> None:
        """Inside a string or a nested value: only where it ends matters."""
        self._append(character)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                if self._depth == 1 and self._expect == "key":
                    self._end_key()
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._end_value()

    def _outer(self, character: str) -> None:
        """At the level of the call's own keys, outside of strings."""
        if self._expect == "value":
            self._value_character(character)
        elif character in _SPACE:
            return
        elif self._expect == "{" and character == "{":
            self._depth, self._expect = 1, "key"
        elif self._expect == "key" and character == '"':
            self._in_string, self._value = True, '"'
        elif self._expect == ":" and character == ":":
            self._expect, self._value = "value", ""
        elif self._expect == "," and character == ",":
            self._expect = "key"
        elif self._expect in (",", "key") and character == "}":
            self._end_object()
        else:
            self.failed = True

    def _value_character(self, character: str) -> None:
        if not self._value and character in _SPACE:
            return
        if character == "," or character == "}":
            self._end_value()
            if not self.failed:
                self._outer(character)
            return
        self._append(character)
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1

    def _append(self, character: str) -> None:
        if self._expect == "value" and self._key in _ARGUMENTS:
            self._has_arguments |= not self._value and character == "{"
            if self._has_arguments:
                self._value = "{"
                self._arguments += character
                return
        self._value += character

    def _end_key(self) -> None:
        try:
            self._key = str(json.loads(self._value, strict=False))
        except ValueError:
            self.failed = True
        self._expect = ":"

    def _end_value(self) -> None:
        text, self._value, self._expect = self._value.strip(), "", ","
        if self._key == "name":
            self._take_name(text)
        elif self._key in _ARGUMENTS and not text.startswith("{"):
            self._has_arguments = True
            self._arguments = _arguments_of(text)
            self.failed |= not self._arguments

    def _take_name(self, text: str) -> None:
        try:
            name = json.loads(text, strict=False)
        except ValueError:
            name = None
        known = self._names is None or name in self._names
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME and known and self._name is None:
            self._name = name
        else:
            self.failed = True

    def _end_object(self) -> None:
        if self._name is None or (self._names is not None and not self._has_arguments):
            self.failed = True
            return
        if not self._has_arguments:
            self._arguments = "{}"
        self.done = True


def _arguments_of(text: str) -> str:
    """Arguments that are not written as an object: a string that holds one, or null."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return ""
    if value is None:
        return "{}"
    return value if isinstance(value, str) else text
