"""Mirostat version 2: keeps the surprise of the text near a target by moving a cut-off.

Basu et al. 2020, arXiv:2007.14966, algorithm 2. As in llama.cpp the surprise that is fed back is
measured after the cut.
"""

from __future__ import annotations

import numpy as np

from nybble.generate.candidates import Candidates


class Mirostat:
    """The cut-off of one sequence; starts at twice the target ``tau`` (bits)."""

    def __init__(self, tau: float, eta: float) -> None:
        self._tau = tau
        self._eta = eta
        self.cutoff = 2.0 * tau

    def cut(self, candidates: Candidates) -> Candidates:
        """Tokens whose surprise, -log2(probability), is at most the cut-off; at least the likeliest."""
        weights = candidates.weights()
        least = weights.sum() * 2.0**-self.cutoff
        kept = (weights >= least) | (candidates.logits == candidates.maximum)
        return candidates.take(kept)

    def observe(self, probability: float) -> None:
        """Move the cut-off after a token of this probability was drawn."""
        self.cutoff -= self._eta * (-float(np.log2(probability)) - self._tau)
