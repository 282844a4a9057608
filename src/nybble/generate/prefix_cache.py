"""PrefixCache: sequences that a finished generation left behind, for the next prompt to go on from.

Not safe for several threads; the runner holds its lock around every call.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from nybble.devices.base import Sequence
from nybble.errors import NybbleError
from nybble.generate.candidates import Logits


@dataclass
class Prefix:
    """A sequence, and the logits (vocab_size,) after its first ``prompt_length`` tokens if known.

    With them, asking the same again gives the same text bit for bit and computes no prompt.
    ``adapters`` are the weights of LoRA adapters that the sequence was made with.
    """

    sequence: Sequence
    prompt_length: int = 0
    logits: Logits | None = None
    adapters: tuple[float, ...] = ()


class PrefixCache:
    """Keeps the ``capacity`` most recently used sequences."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._idle: list[Prefix] = []

    def take(self, tokens: Items[int], adapters: tuple[float, ...] = ()) -> Prefix | None:
        """The sequence that shares most tokens with this prompt, cut to what it shares; or None.

        Only sequences with the same adapters count: other weights give other keys and values.

        At least the last prompt token is left to compute, unless the result's ``logits`` are those
        after the whole prompt. The caller owns the sequence until it is put back.
        """
        shared = [
            common_prefix(prefix.sequence.tokens, tokens) if prefix.adapters == adapters else 0
            for prefix in self._idle
        ]
        if not shared or max(shared) == 0:
            return None
        best = shared.index(max(shared))
        prefix, length = self._idle[best], shared[best]
        whole = prefix.logits is not None and prefix.prompt_length == length == len(tokens)
        length = length if whole else min(length, len(tokens) - 1)
        # What the new prompt does not share is worth keeping only where there is room for both.
        if len(self._idle) < self._capacity and length < prefix.sequence.length:
            prefix = replace(prefix, sequence=prefix.sequence.fork())
        else:
            del self._idle[best]
        return self._cut(prefix, length, whole)

    def put(self, prefix: Prefix) -> None:
        """Keep a sequence; the least recently used one goes if there are too many."""
        self._idle.insert(0, prefix)
        for old in self._idle[self._capacity :]:
            old.sequence.close()
        del self._idle[self._capacity :]

    def clear(self) -> bool:
        """Free everything; returns whether there was anything."""
        found = bool(self._idle)
        for prefix in self._idle:
            prefix.sequence.close()
        self._idle.clear()
        return found

    @staticmethod
    def _cut(prefix: Prefix, length: int, whole: bool) -> Prefix | None:
        """Truncate; a device may keep less (a sliding window has freed pages) or refuse."""
        try:
            if length < prefix.sequence.length:
                prefix.sequence.truncate(length)
        except NybbleError:
            prefix.sequence.close()
            return None
        if not whole or prefix.sequence.length != length:
            return Prefix(prefix.sequence, adapters=prefix.adapters)
        return prefix


def common_prefix(a: Items[int], b: Items[int]) -> int:
    """How many tokens two lists share from their start."""
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size], dtype=np.int64) != np.asarray(b[:size], dtype=np.int64))
    return int(different[0]) if different.size else size
