"""The whole chain: exact distributions, determinism, and what stops a broken model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import DeviceError
from nybble.generate.candidates import Candidates
from nybble.generate.mirostat import Mirostat
from nybble.generate.options import GenerationOptions
from nybble.generate.sampler import Sampler, _draw

NEUTRAL = dict(top_k=0, top_p=1.0, min_p=0.0, temperature=1.0)


def sampler(vocab_size, history=(), seed=0, index=0, **options):
    chosen = GenerationOptions(**{**NEUTRAL, **options})
    return Sampler(chosen, vocab_size=vocab_size, history=history, seed=seed, index=index)


def distribution(logits, history=(), **options):
    logits = np.array(logits, dtype=np.float32)
    ids, probabilities = sampler(logits.size, history, **options).distribution(logits)
    result = np.zeros(logits.size)
    result[ids] = probabilities
    return result


LOG = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([16, 9, 4, 1]) / 30),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.5001}, [4 / 7, 3 / 7, 0, 0]),
        # top-k first, then top-p over what it left: 0.4/0.7 is below 0.6, so both stay.
        ({"top_k": 2, "top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 2, "top_p": 0.57}, [1, 0, 0, 0]),
        # temperature comes last: it does not change what top-p keeps.
        ({"top_p": 0.65, "temperature": 100.0}, [0.5007, 0.4993, 0, 0]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.25}, [0, 0.5, 1 / 3, 1 / 6]),
        ({"xtc_probability": 0.0, "xtc_threshold": 0.25}, [0.4, 0.3, 0.2, 0.1]),
        ({"logit_bias": {0: -math.inf}}, [0, 0.5, 1 / 3, 1 / 6]),
        ({"logit_bias": {3: math.log(4)}}, np.array([0.4, 0.3, 0.2, 0.4]) / 1.3),
        ({"frequency_penalty": math.log(2)}, np.array([0.4, 0.3 / 4, 0.2 / 2, 0.1]) / 0.675),
        ({"presence_penalty": math.log(2)}, np.array([0.4, 0.15, 0.1, 0.1]) / 0.75),
        ({"presence_penalty": math.log(2), "penalty_last_n": 1}, np.array([0.4, 0.15, 0.2, 0.1]) / 0.85),
        ({"presence_penalty": math.log(2), "penalty_last_n": 0}, [0.4, 0.3, 0.2, 0.1]),
        # log-probabilities are negative, so the repetition penalty multiplies them.
        ({"repetition_penalty": 2.0}, np.array([0.4, 0.09, 0.04, 0.1]) / 0.63),
    ],
)
def test_exact_distribution(options, expected):
    np.testing.assert_allclose(distribution(LOG, history=[1, 2, 1], **options), expected, atol=1e-4)


def test_dry_is_in_the_chain():
    probabilities = distribution(
        LOG, history=[0, 1, 2, 3, 0, 1, 2], dry_multiplier=math.log(10), dry_base=1.0
    )
    np.testing.assert_allclose(probabilities, np.array([0.4, 0.3, 0.2, 0.01]) / 0.91, rtol=1e-5)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_draw_is_the_inverse_of_the_cumulative_distribution(weights, uniform):
    probabilities = np.array(weights) / sum(weights)
    place = _draw(probabilities, uniform)
    cumulative = np.cumsum(probabilities)
    total = cumulative[-1]
    assert uniform * total < cumulative[place] or place == len(weights) - 1
    assert place == 0 or cumulative[place - 1] <= uniform * total


def test_draw_never_takes_what_has_no_probability():
    assert _draw(np.array([0.0, 1.0, 0.0]), 0.0) == 1
    assert _draw(np.array([0.0, 1.0, 0.0]), np.nextafter(1.0, 0.0)) == 1


def test_draws_follow_the_distribution():
    logits = np.array(LOG, dtype=np.float32)
    draw = sampler(4, seed=5)
    counts = np.bincount([draw.sample(logits) for _ in range(20_000)], minlength=4)
    expected = np.array([0.4, 0.3, 0.2, 0.1]) * 20_000
    # Chi-square with 3 degrees of freedom; 16.3 is its 99.9th percentile; the seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_same_seed_same_tokens_and_other_indices_other_tokens():
    logits = np.random.default_rng(0).normal(0, 1, (50, 500)).astype(np.float32)

    def tokens(seed, index):
        draw = sampler(500, seed=seed, index=index, top_k=40, xtc_probability=0.5, mirostat=0)
        return [draw.sample(row) for row in logits]

    assert tokens(1, 0) == tokens(1, 0)
    assert tokens(1, 0) != tokens(1, 1)
    assert tokens(1, 0) != tokens(2, 0)
    assert tokens(2**64 - 1, 0) == tokens(2**64 - 1, 0)


def test_equal_logits_lowest_id_first():
    logits = np.array([0, 2, 1, 2, 2], dtype=np.float32)
    assert sampler(5, temperature=0).sample(logits) == 1
    assert np.flatnonzero(distribution(logits, top_k=2)).tolist() == [1, 3]


def test_the_logits_are_not_changed():
    logits = np.array(LOG, dtype=np.float32)
    before = logits.copy()
    chain = sampler(
        4, [0, 1], repetition_penalty=2, dry_multiplier=1, logit_bias={0: 1}, temperature=0.5, top_k=2
    )
    chain.sample(logits, forbidden=(1,))
    assert (logits == before).all()


def test_forbidden_tokens_never_come():
    assert sampler(4, temperature=0).sample(np.array(LOG, dtype=np.float32), forbidden=(0, 1)) == 2


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[math.nan, 1, 2], [1, math.inf, 2], [-math.inf] * 3])
def test_a_broken_model_is_named(temperature, logits):
    with pytest.raises(DeviceError, match="the model's logits are"):
        sampler(3, temperature=temperature).sample(np.array(logits, dtype=np.float32))


def test_bias_outside_the_vocabulary():
    with pytest.raises(ValueError, match="token ids must be between 0 and 3, got \\[4\\]"):
        sampler(4, logit_bias={4: 1.0})


def test_a_tiny_temperature_does_not_overflow():
    assert distribution([1000.0, 999.0, -1000.0], temperature=2e-5).tolist() == [1, 0, 0]


# -- mirostat ---------------------------------------------------------------------------------------


def test_mirostat_keeps_tokens_below_its_cutoff():
    mirostat = Mirostat(tau=1.0, eta=0.1)  # cut-off: 2 bits, probability 1/4
    logits = np.log(np.array([0.1, 0.3, 0.2, 0.4], dtype=np.float32))
    assert mirostat.cut(Candidates.all(logits)).ids.tolist() == [1, 3]
    mirostat.observe(0.5)  # surprise of 1 bit: on target
    assert mirostat.cutoff == 2.0
    mirostat.observe(0.25)
    assert mirostat.cutoff == pytest.approx(1.9)
    mirostat.cutoff = -5.0
    assert mirostat.cut(Candidates.all(logits)).ids.tolist() == [3]


def test_mirostat_reaches_its_surprise():
    logits = (-np.log(np.arange(1, 2001)) * 1.1).astype(np.float32)  # Zipf's law
    probabilities = np.exp(logits) / np.exp(logits).sum()
    chain = sampler(2000, seed=3, mirostat=2, mirostat_tau=4.0, mirostat_eta=0.1)
    surprise = [-np.log2(probabilities[chain.sample(logits)]) for _ in range(3000)]
    free = -(probabilities * np.log2(probabilities)).sum()
    assert free > 7
    # The paper measures before the cut, llama.cpp and nybble after it: a little above the target.
    assert 3.5 < np.mean(surprise[500:]) < 5.5
