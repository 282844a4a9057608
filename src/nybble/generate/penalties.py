"""Penalties on tokens that occurred recently: repetition, presence and frequency.

Repetition: Keskar et al. 2019 (CTRL), arXiv:1909.05858, with the sign rule that makes the token
less likely whatever its logit's sign. Presence and frequency: OpenAI's API reference.
"""

from __future__ import annotations

import numpy as np

from nybble.generate.candidates import Ids, Logits


def penalize(logits: Logits, recent: Ids, *, repetition: float, presence: float, frequency: float) -> None:
    """Change the logits (vocab_size,) of the tokens in ``recent`` in place."""
    if not recent.size:
        return
    ids, counts = np.unique(recent, return_counts=True)
    values = logits[ids]
    values = np.where(values > 0, values / repetition, values * repetition)
    logits[ids] = values - presence - counts * frequency
