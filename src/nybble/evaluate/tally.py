"""Tally: gathers one model's measures window by window, and says what they come to.

Kept are a few numbers a token and the flips that will be shown, never logits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nybble.evaluate.estimates import exponential, mean, quantile, share
from nybble.evaluate.measures import Rows
from nybble.evaluate.results import Flip, Quality
from nybble.evaluate.windows import Ids, context_before
from nybble.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float64]

CONTEXT_TOKENS = 40
"""Tokens before a flip that its context is decoded from."""

_Kept = tuple[float, int, int, int, tuple[float, float, float, float]]


class Tally:
    """The measures of one model; ``reference`` None: it is the reference itself."""

    def __init__(self, *, is_reference: bool, flips: int) -> None:
        self._is_reference = is_reference
        self._most = flips
        self._nll: list[Floats] = []
        self._kld: list[Floats] = []
        self._flips = 0
        self._kept: list[_Kept] = []

    def add(self, rows: Rows, positions: Sequence[int]) -> None:
        """Take the measures of some tokens; ``positions``: where in the text they are."""
        self._nll.append(rows.nll)
        if self._is_reference:
            return
        self._kld.append(rows.kld)
        (flipped,) = np.nonzero(rows.best != rows.reference_best)
        self._flips += len(flipped)
        for i in flipped.tolist():
            probabilities = (
                float(rows.reference_best_in_reference[i]),
                float(rows.best_in_reference[i]),
                float(rows.best_probability[i]),
                float(rows.reference_best_probability[i]),
            )
            loss = probabilities[0] - probabilities[1]
            kept = (loss, -positions[i], int(rows.reference_best[i]), int(rows.best[i]), probabilities)
            if len(self._kept) < self._most:
                heapq.heappush(self._kept, kept)
            elif self._most and kept > self._kept[0]:
                heapq.heapreplace(self._kept, kept)

    @property
    def nll(self) -> Floats:
        """Negative log-likelihoods of all tokens so far, in their order."""
        return np.concatenate(self._nll) if self._nll else np.empty(0)

    def quality(self, reference: Tally) -> Quality:
        """The estimates; ``reference``: the tally of the reference on the same tokens."""
        nll = self.nll
        count = len(nll)
        perplexity = exponential(mean(nll))
        if self._is_reference:
            return Quality(count, perplexity)
        kld = np.concatenate(self._kld)
        return Quality(
            tokens=count,
            perplexity=perplexity,
            perplexity_ratio=exponential(mean(nll - reference.nll)),
            kld=mean(kld),
            kld_median=quantile(kld, 0.5),
            kld99=quantile(kld, 0.99),
            kld_max=float(kld.max()),
            top1=share(count - self._flips, count),
            flips=self._flips,
        )

    def flips(self, tokenizer: Tokenizer, tokens: Ids) -> tuple[Flip, ...]:
        """The kept flips, the one with the greatest loss first."""

        def piece(token: int) -> str:
            if token >= tokenizer.vocab_size:
                return f"(token {token})"
            return tokenizer.token_bytes(token).decode(errors="replace")

        found = []
        for _, place, reference_best, best, probabilities in sorted(self._kept, reverse=True):
            position = -place
            before = tokens[max(0, position - CONTEXT_TOKENS) : position].tolist()
            found.append(
                Flip(
                    position=position,
                    context=context_before(tokenizer, before),
                    actual=piece(int(tokens[position])),
                    reference_token=piece(reference_best),
                    token=piece(best),
                    reference_probability=probabilities[0],
                    token_in_reference=probabilities[1],
                    probability=probabilities[2],
                    reference_token_in_model=probabilities[3],
                )
            )
        return tuple(found)
