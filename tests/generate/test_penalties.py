"""Penalties and DRY against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.generate.dry import Dry, breaker_tokens
from nybble.generate.penalties import penalize

VOCABULARY = 6
histories = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


@given(histories, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_penalize(recent, repetition, presence, frequency):
    logits = np.array([-3, -1, -0.5, 0.5, 1, 3], dtype=np.float32)
    expected = logits.astype(np.float64)
    for token in set(recent):
        expected[token] = (
            expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        )
        expected[token] -= presence + frequency * recent.count(token)
    penalize(
        logits,
        np.array(recent, dtype=np.int64),
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def dry_by_definition(history, *, multiplier, base, allowed_length, last_n, breakers):
    """Penalty of each token: compare the end with every earlier place, token by token."""
    window = history if last_n < 0 else history[max(0, len(history) - last_n) :]
    longest = {}
    for i in range(len(window) - 1):
        following = window[i + 1]
        if following in breakers:
            continue
        length = 0
        while i - length >= 0:
            token = window[len(window) - 1 - length]
            if window[i - length] != token or token in breakers:
                break
            length += 1
        longest[following] = max(longest.get(following, 0), length)
    return {
        token: multiplier * base ** (length - allowed_length)
        for token, length in longest.items()
        if length >= allowed_length
    }


@given(
    prompt=histories,
    generated=histories,
    breakers=st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
    allowed_length=st.integers(1, 4),
    last_n=st.sampled_from([-1, 3, 7, 20]),
)
def test_dry(prompt, generated, breakers, allowed_length, last_n):
    settings = dict(
        multiplier=0.8, base=1.75, allowed_length=allowed_length, last_n=last_n, breakers=breakers
    )
    dry = Dry(vocab_size=VOCABULARY, **settings)
    dry.extend(prompt)
    history = list(prompt)
    for token in [*generated, None]:
        penalties = dry_by_definition(history, **settings)
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        dry.penalize(logits)
        expected = np.zeros(VOCABULARY)
        for penalized, amount in penalties.items():
            expected[penalized] = -amount
        np.testing.assert_allclose(logits, expected, rtol=1e-6)
        if token is not None:
            dry.extend([token])
            history.append(token)


def test_dry_of_a_text_that_goes_round_in_circles_stays_finite():
    dry = Dry(multiplier=5, base=3, allowed_length=1, last_n=-1, breakers=(), vocab_size=4)
    dry.extend([1] * 3000)
    logits = np.ones(4, dtype=np.float32)
    dry.penalize(logits)
    assert logits[[0, 2, 3]].tolist() == [1, 1, 1]
    assert np.isfinite(logits[1])
    assert logits[1] < -1e20


def test_dry_example():
    # "a b c d ... a b c": d would repeat four tokens, of which three have come.
    dry = Dry(multiplier=1, base=2, allowed_length=2, last_n=-1, breakers=(), vocab_size=8)
    dry.extend([0, 1, 2, 3, 7, 0, 1, 2])
    logits = np.zeros(8, dtype=np.float32)
    dry.penalize(logits)
    assert logits.tolist() == [0, 0, 0, -2, 0, 0, 0, 0]


def test_breaker_tokens():
    pieces = [b"a", b"b\n", b":", b"::", b"\xc3"]
    assert breaker_tokens(pieces, ["\n", ":"]) == [1, 2, 3]
    with pytest.raises(ValueError, match="no single token contains 'q'"):
        breaker_tokens(pieces, [":", "q"])
