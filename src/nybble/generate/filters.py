"""Samplers that cut the distribution: top-k, top-p, min-p, typical, top-n-sigma, XTC.

Each is a function from candidates to fewer candidates (at least one); probabilities are the
softmax over what is left at that point.
"""

from __future__ import annotations

import numpy as np

from nybble.generate.candidates import Candidates


def top_k(candidates: Candidates, k: int) -> Candidates:
    """The ``k`` most probable; 0 keeps all. Fan et al. 2018, arXiv:1805.04833."""
    return candidates.head(k) if 0 < k < len(candidates) else candidates


def top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest most probable tokens whose probabilities add up to at least ``p``.

    Holtzman et al. 2019, arXiv:1904.09751.
    """
    if p >= 1.0:
        return candidates
    total = float(candidates.weights().sum())
    size = 64
    while True:
        head = candidates.head(size)
        cumulative = np.exp(head.logits.astype(np.float64) - head.maximum).cumsum() / total
        if cumulative[-1] >= p or len(head) == len(candidates):
            return head.take(slice(0, int(np.searchsorted(cumulative, p)) + 1))
        size *= 8


def min_p(candidates: Candidates, p: float) -> Candidates:
    """Tokens at least ``p`` times as probable as the most probable. Nguyen et al., arXiv:2407.01082."""
    if p <= 0.0:
        return candidates
    bound = candidates.maximum + np.log(p)
    kept = candidates.logits.astype(np.float64) >= bound
    # p = 1 must keep the maximum itself.
    kept |= candidates.logits == candidates.maximum
    return candidates.take(kept)


def typical(candidates: Candidates, p: float) -> Candidates:
    """Tokens whose surprise is closest to the entropy, until their probabilities reach ``p``.

    Meister et al. 2022, arXiv:2202.00666.
    """
    if p >= 1.0:
        return candidates
    probabilities = candidates.probabilities()
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(probabilities)
        entropy = float(np.where(probabilities > 0, probabilities * surprise, 0.0).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    cumulative = probabilities[order].cumsum()
    count = int(np.searchsorted(cumulative, p)) + 1
    return candidates.take(np.sort(order[:count]))


def top_n_sigma(candidates: Candidates, n: float) -> Candidates:
    """Logits at least max - n * standard deviation. Tang et al. 2024, arXiv:2411.07641.

    Forbidden tokens (logit -inf) do not count in the deviation.
    """
    if n <= 0.0:
        return candidates
    logits = candidates.logits
    with np.errstate(invalid="ignore"):
        deviation = float(logits.std(dtype=np.float64))
    if not np.isfinite(deviation):
        deviation = float(logits[np.isfinite(logits)].std(dtype=np.float64))
    return candidates.take(logits >= candidates.maximum - n * deviation)


def xtc(candidates: Candidates, threshold: float) -> Candidates:
    """Exclude top choices: remove every token at least ``threshold`` probable but the last of them.

    The caller decides at random whether XTC acts. p-e-w 2024,
    https://github.com/oobabooga/text-generation-webui/pull/6335.
    """
    probabilities = candidates.probabilities()
    above = np.flatnonzero(probabilities >= threshold)
    if above.size < 2:
        return candidates
    chosen = candidates.take(above).sort().ids[-1]
    kept = probabilities < threshold
    kept |= candidates.ids == chosen
    return candidates.take(kept)
