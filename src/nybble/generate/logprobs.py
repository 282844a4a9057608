"""Log-probabilities of generated tokens, from the logits as the model gave them."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.generate.candidates import Candidates, Logits, log_softmax


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token: its natural log-probability and the most probable alternatives.

    Computed before bias, penalties, temperature and the other samplers. ``top`` holds (token id,
    log-probability) pairs, most probable first; it may or may not hold the token itself.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: Logits, token: int, top: int) -> TokenLogprob:
    """The log-probability of ``token`` and of the ``top`` most probable tokens; logits (vocab_size,)."""
    logprobs = log_softmax(logits)
    ids = Candidates.all(logits).head(top).ids if top else ()
    pairs = tuple((int(i), float(logprobs[i])) for i in ids)
    return TokenLogprob(token, float(logprobs[token]), pairs)
