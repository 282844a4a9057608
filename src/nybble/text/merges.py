"""Merges of a SentencePiece BPE vocabulary, recovered from its scores.

Such a vocabulary says only how good each token is; two neighbours merge when their joined text is
a token, the best score first. `tokenizers` wants the pairs themselves: every way to cut a token
into two tokens, ordered by the score of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nybble.errors import UnsupportedError

_MULTIPLIER = 0x9E3779B97F4A7C15 | 1
_TABLE_BITS = 21

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


def merges_from_scores(
    texts: Sequence[str], scores: npt.NDArray[np.float32], mergeable: npt.NDArray[np.bool_]
) -> list[tuple[str, str]]:
    """All (left, right) with left, right and left + right mergeable tokens, best merge first.

    ``scores`` and ``mergeable`` have shape (len(texts),). Equal scores keep the order of the
    vocabulary; cuts of one token are ordered by the ids of their parts, as the converters of
    transformers do.

    Prefixes and suffixes are looked up by a 64-bit polynomial hash of all of them at once: a
    vocabulary of 262,144 tokens has 1.2 million of them, which takes Python a second. Should two
    hashes collide, a pair does not make a token and `tokenizers` refuses the merges.
    """
    ids = np.flatnonzero(mergeable)
    words = [texts[i] for i in ids.tolist()]
    if not words:
        return []
    if len(words) >= 1 << 21:
        raise UnsupportedError(
            f"a SentencePiece vocabulary of {len(words)} tokens; nybble takes up to {1 << 21}"
        )
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    joined = "".join(words)
    characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    with np.errstate(over="ignore"):
        sums, inverse = _prefix_sums(characters + np.uint64(1))
        whole = _mix((sums[ends] - sums[starts]) * inverse[starts])
        # One row for each inner cut of each token: cut lies strictly between start and end.
        inner = np.maximum(lengths - 1, 0)
        owner = np.repeat(np.arange(len(words)), inner)
        cut = np.arange(int(inner.sum())) - np.repeat(np.cumsum(inner) - inner, inner) + starts[owner] + 1
        table = _HashTable(whole)
        left = table.find(_mix((sums[cut] - sums[starts[owner]]) * inverse[starts[owner]]))
        kept = np.flatnonzero(left >= 0)
        left, owner, cut = left[kept], owner[kept], cut[kept]
        right = table.find(_mix((sums[ends[owner]] - sums[cut]) * inverse[cut]))
        kept = np.flatnonzero(right >= 0)
        left, right, owner = left[kept], right[kept], owner[kept]

    rank = np.empty(len(words), np.int64)
    rank[np.argsort(-scores[ids], kind="stable")] = np.arange(len(words))
    # One sort key: rank of the whole, then left, then right, 21 bits each.
    order = np.argsort((rank[owner] << 42) | (left << 21) | right)
    left, right, owner = left[order], right[order], owner[order]
    names = np.array(words, dtype=object)
    return list(zip(names[left].tolist(), names[right].tolist(), strict=True))


def _prefix_sums(values: U64) -> tuple[U64, U64]:
    """Sums of value[i] * m**i for every prefix, and m**-i, both modulo 2**64."""
    count = len(values)
    powers = np.full(count + 1, _MULTIPLIER, np.uint64)
    powers[0] = 1
    inverse = np.full(count + 1, pow(_MULTIPLIER, -1, 1 << 64), np.uint64)
    inverse[0] = 1
    np.multiply.accumulate(powers, out=powers)
    np.multiply.accumulate(inverse, out=inverse)
    sums = np.zeros(count + 1, np.uint64)
    np.cumsum(values * powers[:-1], out=sums[1:])
    return sums, inverse


def _mix(values: U64) -> U64:
    """Spreads the entropy to all bits (finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: U64 = values ^ (values >> np.uint64(31))
    return mixed


class _HashTable:
    """Finds the index of a 64-bit hash among ``keys``, many at a time.

    Each level is a table addressed by other bits of the hash; keys that lose their place to another
    key go to the next level.
    """

    def __init__(self, keys: U64) -> None:
        self._keys = keys
        self._levels: list[tuple[np.uint64, npt.NDArray[np.int32]]] = []
        waiting = np.arange(len(keys), dtype=np.int32)
        for shift in (0, 21, 42):
            table = np.full(1 << _TABLE_BITS, -1, np.int32)
            place = self._place(keys[waiting], np.uint64(shift))
            table[place] = waiting
            self._levels.append((np.uint64(shift), table))
            waiting = waiting[table[place] != waiting]
            if not len(waiting):
                break
        order = np.argsort(keys[waiting])
        self._rest_keys, self._rest = keys[waiting][order], waiting[order]

    @staticmethod
    def _place(keys: U64, shift: np.uint64) -> I64:
        place: I64 = ((keys >> shift) & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
        return place

    def find(self, wanted: U64) -> I64:
        """Index of each wanted hash in ``keys``, or -1; shape (len(wanted),)."""
        result = np.full(len(wanted), -1, np.int64)
        todo = np.arange(len(wanted))
        for shift, table in self._levels:
            keys = wanted[todo]
            candidate = table[self._place(keys, shift)]
            taken = candidate >= 0
            hit = taken & (self._keys[candidate] == keys)
            result[todo[hit]] = candidate[hit]
            # An empty place means that no key has these bits: only the others may be found below.
            todo = todo[taken & ~hit]
        if len(self._rest):
            at = np.minimum(np.searchsorted(self._rest_keys, wanted[todo]), len(self._rest) - 1)
            hit = self._rest_keys[at] == wanted[todo]
            result[todo[hit]] = self._rest[at[hit]]
        return result
