"""TokenSequence: the tokens of a sequence, which every device keeps alike; the caches are its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class TokenSequence:
    """Tokens, oldest first. Devices add their cache, and what happens to it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = list(tokens)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        """The tokens; a copy."""
        return list(self._tokens)

    @property
    def held(self) -> Sequence[int]:
        """The tokens themselves, not to be changed."""
        return self._tokens

    def check_length(self, length: int) -> None:
        """Refuses what ``truncate`` cannot keep.

        Raises:
            ValueError: ``length`` is negative or more than the sequence holds.
        """
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"cannot truncate a sequence of {len(self._tokens)} tokens to {length}")
