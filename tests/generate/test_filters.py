"""Every sampler that cuts the distribution, against a plain definition over Python lists."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nybble.generate import filters
from nybble.generate.candidates import Candidates, log_softmax

# Quarters: equal logits are common, so ties are tested too.
logits_lists = st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=1, max_size=300)
fractions = st.floats(0.01, 0.99)


def candidates(logits, presorted=False):
    result = Candidates.all(np.array(logits, dtype=np.float32))
    return result.sort() if presorted else result


def kept_ids(result):
    return sorted(result.ids.tolist())


def by_rank(logits):
    """Ids from the most probable on; equal ones by id."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def fewest(order, probabilities, p):
    """Ids in this order until their probabilities add up to p."""
    total, kept = 0.0, []
    for i in order:
        kept.append(i)
        total += probabilities[i]
        if total >= p:
            break
    return kept


def assume_not_on_the_edge(order, probabilities, p):
    """Sums of floats: p exactly at the border of a token is decided by rounding."""
    cumulative = np.cumsum([probabilities[i] for i in order])
    assume(np.abs(cumulative - p).min() > 1e-9)


@given(logits_lists, st.integers(1, 320), st.booleans())
def test_head_is_the_start_of_the_full_order(logits, k, presorted):
    head = candidates(logits, presorted).head(k)
    assert head.ids.tolist() == by_rank(logits)[:k]
    assert head.logits.tolist() == [logits[i] for i in head.ids]
    assert head.ordered


@pytest.mark.parametrize("size", [10_000, 49_152])
def test_head_of_a_large_vocabulary(size):
    logits = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    logits[::1000] = 20.0  # many equal maxima
    expected = np.lexsort((np.arange(size), -logits))
    for k in (1, 2, 40, 700, size - 1):
        assert Candidates.all(logits).head(k).ids.tolist() == expected[:k].tolist()


@given(logits_lists, st.integers(0, 320))
def test_top_k(logits, k):
    assert kept_ids(filters.top_k(candidates(logits), k)) == sorted(by_rank(logits)[: k or None])


@given(logits_lists, fractions, st.booleans())
def test_top_p(logits, p, presorted):
    probabilities, order = softmax(logits), by_rank(logits)
    assume_not_on_the_edge(order, probabilities, p)
    assert kept_ids(filters.top_p(candidates(logits, presorted), p)) == sorted(
        fewest(order, probabilities, p)
    )


def test_top_p_of_a_flat_large_vocabulary_goes_beyond_its_first_guess():
    logits = np.zeros(20_000, dtype=np.float32)
    kept = filters.top_p(Candidates.all(logits), 0.50001)
    assert kept.ids.tolist() == list(range(10_001))


@given(logits_lists, fractions)
def test_min_p(logits, p):
    probabilities = softmax(logits)
    bound = p * max(probabilities)
    assume(min(abs(q - bound) / bound for q in probabilities) > 1e-9)
    expected = [i for i, q in enumerate(probabilities) if q >= bound]
    assert kept_ids(filters.min_p(candidates(logits), p)) == expected


def test_min_p_of_one_keeps_the_maxima():
    assert kept_ids(filters.min_p(candidates([1.0, 3.0, 3.0, 2.9]), 1.0)) == [1, 2]


@given(logits_lists, fractions, st.booleans())
def test_typical(logits, p, presorted):
    probabilities = softmax(logits)
    entropy = -math.fsum(q * math.log(q) for q in probabilities)
    distance = [abs(-math.log(q) - entropy) for q in probabilities]
    # Two different logits may be as far from the entropy as each other: rounding decides.
    different = {}
    for logit, far in zip(logits, distance):
        different[logit] = far
    values = sorted(different.values())
    assume(all(b - a > 1e-9 for a, b in itertools.pairwise(values)))
    order = sorted(range(len(logits)), key=lambda i: (different[logits[i]], i))
    assume_not_on_the_edge(order, probabilities, p)
    assert kept_ids(filters.typical(candidates(logits, presorted), p)) == sorted(
        fewest(order, probabilities, p)
    )


@given(logits_lists, st.floats(0.1, 5))
def test_top_n_sigma(logits, n):
    mean = math.fsum(logits) / len(logits)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logits) / len(logits))
    bound = max(logits) - n * deviation
    assume(min(abs(x - bound) for x in logits) > 1e-5 or deviation == 0)
    expected = [i for i, x in enumerate(logits) if x >= bound]
    assert kept_ids(filters.top_n_sigma(candidates(logits), n)) == expected


def test_top_n_sigma_ignores_forbidden_tokens():
    allowed = [5.0, 4.0, 1.0, 0.0]
    logits = [*allowed, -math.inf]
    assert kept_ids(filters.top_n_sigma(candidates(logits), 1.0)) == kept_ids(
        filters.top_n_sigma(candidates(allowed), 1.0)
    )


@given(logits_lists, st.floats(0.01, 0.6), st.booleans())
def test_xtc(logits, threshold, presorted):
    probabilities = softmax(logits)
    assume(min(abs(q - threshold) for q in probabilities) > 1e-9)
    above = [i for i in by_rank(logits) if probabilities[i] >= threshold]
    expected = [i for i in range(len(logits)) if i not in above[:-1]]
    assert kept_ids(filters.xtc(candidates(logits, presorted), threshold)) == expected


@pytest.mark.parametrize(
    "off",
    [
        lambda c: filters.top_k(c, 0),
        lambda c: filters.top_p(c, 1.0),
        lambda c: filters.min_p(c, 0.0),
        lambda c: filters.typical(c, 1.0),
        lambda c: filters.top_n_sigma(c, 0.0),
        lambda c: filters.xtc(c, 1.0),
    ],
)
def test_the_neutral_value_keeps_everything(off):
    assert kept_ids(off(candidates([0.0, 5.0, -3.0]))) == [0, 1, 2]


@settings(max_examples=50)
@given(
    logits_lists, st.lists(st.sampled_from(["k", "p", "m", "t", "s", "x"]), min_size=1, max_size=6), fractions
)
def test_any_chain_keeps_something_and_stays_consistent(logits, chain, value):
    result = candidates(logits)
    for name in chain:
        result = {
            "k": lambda c: filters.top_k(c, 1 + int(value * 20)),
            "p": lambda c: filters.top_p(c, value),
            "m": lambda c: filters.min_p(c, value),
            "t": lambda c: filters.typical(c, value),
            "s": lambda c: filters.top_n_sigma(c, 3 * value),
            "x": lambda c: filters.xtc(c, value),
        }[name](result)
        assert len(result) >= 1
        assert result.logits.tolist() == [logits[i] for i in result.ids]
        if result.ordered:
            assert result.ids.tolist() == [i for i in by_rank(logits) if i in set(result.ids.tolist())]
        else:
            assert result.ids.tolist() == sorted(set(result.ids.tolist()))
        assert math.isclose(result.probabilities().sum(), 1.0)


@given(logits_lists)
def test_log_softmax(logits):
    expected = [math.log(q) for q in softmax(logits)]
    np.testing.assert_allclose(
        log_softmax(np.array(logits, dtype=np.float32)), expected, rtol=1e-9, atol=1e-12
    )
