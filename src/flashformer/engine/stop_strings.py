"""Stop strings: where a text ends, without ever showing a part of the string that ends it."""

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text for the first stop string to be completed.

    The result does not depend on how the text is cut into pieces: of several matches the one that
    ends first wins, of those that end together the longest.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = tuple(strings)
        self._include = include
        self._held = ""  # the longest end of the text that may be the start of a stop string

    def add(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that ended the text, if one did."""
        if not self._strings:
            return text, None
        text = self._held + text
        self._held = ""
        match = self._first_match(text)
        if match is not None:
            start, string = match
            return text[: start + (len(string) if self._include else 0)], string
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """The text held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(string), string) for string in self._strings]
        matches = [(start + len(s), start, s) for start, s in found if start >= 0]
        if not matches:
            return None
        _, start, string = min(matches)
        return start, string

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper start of a stop string."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(len(s) > length and s.startswith(end) for s in self._strings):
                return length
        return 0
