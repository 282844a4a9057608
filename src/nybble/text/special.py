"""Special tokens in text: cuts a text at the names of control, unknown and user-defined tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# What C's isspace() strips: llama.cpp's rule for tokens that eat the white space beside them.
_BLANK = " \t\n\v\f\r"


class SpecialTokenSplitter:
    """Finds token names in a text: leftmost first, then longest.

    ``tokens`` gives (name, id). ``strip_left`` and ``strip_right`` hold the ids that swallow the
    white space before or after them. Names are found by their first two characters and then by
    length, because Gemma has 6,400 of them and one regular expression would be slow to build.
    """

    def __init__(
        self,
        tokens: Iterable[tuple[str, int]],
        strip_left: frozenset[int] = frozenset(),
        strip_right: frozenset[int] = frozenset(),
    ) -> None:
        self._ids = {name: token_id for name, token_id in tokens if name}
        self._strip_left, self._strip_right = strip_left, strip_right
        lengths: dict[str, set[int]] = {}
        for name in self._ids:
            lengths.setdefault(name[:2], set()).add(len(name))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        first = "".join(sorted({name[0] for name in self._ids}))
        self._first = re.compile(f"[{re.escape(first)}]") if first else None

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: plain pieces (never empty) and token ids."""
        if self._first is None:
            if text:
                yield text
            return
        done = position = 0
        while (found := self._first.search(text, position)) is not None:
            start = found.start()
            name = self._match(text, start)
            if name is None:
                position = start + 1
                continue
            token_id = self._ids[name]
            plain = text[done:start]
            if token_id in self._strip_left:
                plain = plain.rstrip(_BLANK)
            if plain:
                yield plain
            yield token_id
            done = start + len(name)
            if token_id in self._strip_right:
                while done < len(text) and text[done] in _BLANK:
                    done += 1
            position = done
        if done < len(text):
            yield text[done:]

    def _match(self, text: str, start: int) -> str | None:
        for key in (text[start : start + 2], text[start]):
            for length in self._lengths.get(key, ()):
                name = text[start : start + length]
                if name in self._ids:
                    return name
        return None
