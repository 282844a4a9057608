"""Stop strings: end the text before the first of them, wherever the tokens' borders lie."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but never a part of a stop string.

    The text ends before the stop string that is complete first (the longest of several that are
    complete at the same character), so the result does not depend on how the text was cut into
    pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Take the next piece; returns the text that is certain not to belong to a stop string."""
        if not self._strings:
            return piece
        if self.found is not None or not piece:
            return ""
        text = self._held + piece
        ends = [(text.find(s) + len(s), -len(s), s) for s in self._strings if s in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        held = self._could_begin(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
