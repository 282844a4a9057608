"""Candidates: the tokens that samplers still consider, and the arithmetic they share.

A vocabulary has up to 262,144 tokens and a sampler usually keeps forty, so nothing here sorts
more than it must. All orders are total: larger logit first, then lower id.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]

_BLOCK = 64


@dataclass(frozen=True)
class Candidates:
    """Token ids (n, int64) and their logits (n, float32), at least one.

    ``ordered``: by descending logit, then ascending id. Otherwise ids ascend.
    """

    ids: Ids
    logits: Logits
    ordered: bool = False

    @classmethod
    def all(cls, logits: Logits) -> Candidates:
        """Every token of the vocabulary; ``logits``: (vocab_size,) float32."""
        return cls(_all_ids(logits.size), logits)

    def __len__(self) -> int:
        return int(self.ids.size)

    @property
    def maximum(self) -> float:
        """The largest logit."""
        return float(self.logits[0] if self.ordered else self.logits.max())

    def take(self, kept: npt.NDArray[np.bool_] | Ids | slice) -> Candidates:
        """The candidates at these places; an index array must keep the order."""
        return Candidates(self.ids[kept], self.logits[kept], self.ordered)

    def sort(self) -> Candidates:
        """All of them in order."""
        if self.ordered:
            return self
        order = np.argsort(-self.logits, kind="stable")
        return Candidates(self.ids[order], self.logits[order], ordered=True)

    def head(self, k: int) -> Candidates:
        """The first ``k`` in order, without sorting the rest."""
        if k >= len(self):
            return self.sort()
        if self.ordered:
            return self.take(slice(0, k))
        rest = self.take(np.flatnonzero(self.logits >= _at_most_kth_largest(self.logits, k)))
        return rest.sort().take(slice(0, k))

    def probabilities(self) -> Floats:
        """Softmax over the candidates; float64."""
        weights = self.weights()
        weights /= weights.sum()
        return weights

    def weights(self) -> Floats:
        """exp(logit - maximum): probabilities before they are divided by their sum; float64."""
        weights: Floats = np.exp(self.logits.astype(np.float64) - self.maximum)
        return weights


@lru_cache(maxsize=2)
def _all_ids(size: int) -> Ids:
    ids = np.arange(size, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _at_most_kth_largest(values: Logits, k: int) -> float:
    """A bound that at least ``k`` values reach and not many more do.

    The k-th largest of the blocks' maxima: k blocks hold a value at least as large. A block is a
    column of 64 values, because NumPy is ten times quicker at maxima over columns than over rows.
    """
    blocks = values.size // _BLOCK
    if blocks < k:
        return float(np.partition(values, values.size - k)[values.size - k])
    maxima = values[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)
    return float(np.partition(maxima, blocks - k)[blocks - k])


def log_softmax(logits: Logits) -> Floats:
    """Log-probabilities of the whole vocabulary, float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    logprobs: Floats = shifted - np.log(np.exp(shifted).sum())
    return logprobs
