"""DRY ("don't repeat yourself"): a penalty on the token that would go on with a repeated phrase.

If the last L tokens also occur earlier, followed by token t, then t loses
multiplier * base ** (L - allowed_length) once L reaches allowed_length. A token that contains a
sequence breaker ends a phrase. p-e-w 2024,
https://github.com/oobabooga/text-generation-webui/pull/5677.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from nybble.generate.candidates import Ids, Logits


class Dry:
    """The history of one sequence and, for each place in it, how much of its end repeats there.

    ``lengths[i]`` is the length of the longest common suffix of ``tokens[:i + 1]`` and of all
    tokens. One more token shifts these lengths by one place, so a step costs one pass over the
    history and never compares phrases again.
    """

    def __init__(
        self,
        *,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: Iterable[int],
        vocab_size: int,
    ) -> None:
        self._multiplier = multiplier
        self._base = base
        self._allowed_length = allowed_length
        self._last_n = last_n
        self._breaker = np.zeros(vocab_size, dtype=np.bool_)
        self._breaker[list(breakers)] = True
        self._size = 0
        self._tokens: Ids = np.zeros(256, dtype=np.int64)
        self._lengths: Ids = np.zeros(256, dtype=np.int64)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the history."""
        new = np.asarray(tokens, dtype=np.int64)
        breakers = np.flatnonzero(self._breaker[new])
        # A breaker makes every length 0, so what comes before the last one need not be followed.
        plain = int(breakers[-1]) + 1 if breakers.size else 0
        if plain:
            self._reserve(plain)
            self._tokens[self._size : self._size + plain] = new[:plain]
            self._size += plain
            self._lengths[: self._size] = 0
        for token in new[plain:]:
            self._append(int(token))

    def penalize(self, logits: Logits) -> None:
        """Subtract the penalties from the logits (vocab_size,) in place."""
        start = 0 if self._last_n < 0 else max(0, self._size - self._last_n)
        if self._size - start < 2:
            return
        lengths = self._lengths[start : self._size - 1]
        inside = np.minimum(lengths, np.arange(1, lengths.size + 1))
        places = np.flatnonzero(inside >= self._allowed_length)
        following = self._tokens[start + 1 + places]
        free = ~self._breaker[following]
        following, matched = following[free], inside[places][free]
        if not following.size:
            return
        longest: Ids = np.zeros(logits.size, dtype=np.int64)
        np.maximum.at(longest, following, matched)
        ids = np.unique(following)
        # Beyond this exponent float32 would overflow; the token is out of the race long before.
        largest = 60.0 / np.log10(self._base) if self._base > 1 else np.inf
        exponent = np.minimum(longest[ids] - self._allowed_length, largest)
        penalty = np.minimum(self._multiplier * self._base**exponent, 1e30)
        logits[ids] -= penalty.astype(np.float32)

    def _append(self, token: int) -> None:
        self._reserve(1)
        size = self._size
        same = self._tokens[:size] == token
        if not self._breaker[token]:
            shifted = np.ones(size, dtype=np.int64)
            shifted[1:] += self._lengths[: size - 1] if size else 0
            self._lengths[:size] = np.where(same, shifted, 0)
            self._lengths[size] = 0
        else:
            self._lengths[: size + 1] = 0
        self._tokens[size] = token
        self._size += 1

    def _reserve(self, count: int) -> None:
        needed = self._size + count
        if needed > self._tokens.size:
            capacity = max(needed, 2 * self._tokens.size)
            self._tokens = np.resize(self._tokens, capacity)
            self._lengths = np.resize(self._lengths, capacity)


def breaker_tokens(tokens: Iterable[bytes], breakers: Sequence[str]) -> list[int]:
    """Ids of the tokens whose bytes (``tokens`` in order of id) contain a sequence breaker.

    Raises:
        ValueError: no token contains this breaker, so it could never act.
    """
    pieces = list(tokens)
    found: set[int] = set()
    for breaker in breakers:
        sought = breaker.encode()
        ids = [token for token, piece in enumerate(pieces) if sought in piece]
        if not ids:
            raise ValueError(
                f"dry_sequence_breakers: no single token contains {breaker!r}; take a shorter string"
            )
        found.update(ids)
    return sorted(found)
