"""Measures of logits against plain formulas in extended precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nybble.evaluate import measures
from nybble.evaluate.measures import log_likelihoods, measure


def log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.longdouble)
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def random_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * spread).astype(np.float32)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (7, 101), (40, 5000), (3, 262_144)])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_measure(rows: int, vocabulary: int, threads: int) -> None:
    reference = random_logits(rows, vocabulary)
    other = reference + random_logits(rows, vocabulary, 1, 0.5)
    targets = np.random.default_rng(2).integers(0, vocabulary, rows)
    first, second = measure(reference, [other], targets, threads=threads)
    p, q = log_softmax(reference), log_softmax(other)
    row = np.arange(rows)
    near = {"rtol": 1e-11, "atol": 1e-12}
    np.testing.assert_allclose(first.nll, -p[row, targets].astype(float), **near)
    np.testing.assert_allclose(second.nll, -q[row, targets].astype(float), **near)
    np.testing.assert_allclose(second.kld, (np.exp(p) * (p - q)).sum(axis=1).astype(float), **near)
    assert (first.kld == 0).all()
    best, other_best = reference.argmax(axis=1), other.argmax(axis=1)
    np.testing.assert_array_equal(second.best, other_best)
    np.testing.assert_array_equal(second.reference_best, best)
    np.testing.assert_array_equal(first.best, best)
    for found, expected in (
        (first.best_probability, p[row, best]),
        (second.best_probability, q[row, other_best]),
        (second.reference_best_probability, q[row, best]),
        (second.best_in_reference, p[row, other_best]),
        (second.reference_best_in_reference, p[row, best]),
    ):
        np.testing.assert_allclose(found, np.exp(expected).astype(float), **near)


def test_small_divergences_are_not_lost() -> None:
    """Differences of one float32 step: about 1e-13, where a sum in float32 would say 1e-7 or less than 0."""
    reference = random_logits(64, 50_000, spread=3.0)
    other = reference * np.float32(1 + 2**-22)
    kld = measure(reference, [other], np.zeros(64, int))[1].kld
    p, q = log_softmax(reference), log_softmax(other)
    np.testing.assert_allclose(kld, (np.exp(p) * (p - q)).sum(axis=1).astype(float), rtol=0.02, atol=2e-15)
    assert kld.max() < 1e-11


finite = st.floats(-80, 80, width=32)


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(np.float32, (3, 9), elements=finite),
    arrays.arrays(np.float32, (3, 9), elements=finite),
    st.floats(-30, 30, width=32),
)
def test_properties(x: np.ndarray, y: np.ndarray, shift: float) -> None:
    targets = [0, 4, 8]
    one, two, same = measure(x, [y, x], targets)
    assert (two.kld >= 0).all() and (same.kld == 0).all()
    np.testing.assert_array_equal(same.nll, one.nll)
    # A constant that is added to a row of logits changes no probability.
    moved = measure(x, [(y.astype(np.float64) + shift).astype(np.float32)], targets)[1]
    np.testing.assert_allclose(moved.nll, two.nll, atol=1e-4)
    np.testing.assert_allclose(moved.kld, two.kld, atol=1e-3, rtol=1e-4)
    # A row's measures do not depend on the rows beside it, nor on how they are cut.
    alone = measure(x[1:2], [y[1:2]], targets[1:2])[1]
    assert alone.kld[0] == two.kld[1] and alone.nll[0] == two.nll[1]


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random_logits(50, 300), random_logits(50, 300, 1)
    targets = list(range(50))
    whole = measure(x, [y], targets, threads=1)[1]
    monkeypatch.setattr(measures, "_BLOCK_ELEMENTS", 700)
    cut = measure(x, [y], targets, threads=4)[1]
    np.testing.assert_array_equal(whole.kld, cut.kld)
    np.testing.assert_array_equal(whole.best, cut.best)


def test_log_likelihoods() -> None:
    logits = random_logits(5, 30)
    targets = logits.argmax(axis=1)
    targets[2] = (targets[2] + 1) % 30
    found, best = log_likelihoods(logits, targets.tolist())
    np.testing.assert_allclose(found, log_softmax(logits)[np.arange(5), targets].astype(float))
    assert best.tolist() == [True, True, False, True, True]


def test_shapes_that_do_not_fit() -> None:
    x = random_logits(3, 10)
    for others, targets in (([x[:2]], [0, 0, 0]), ([random_logits(3, 11)], [0, 0, 0]), ([], [0, 0])):
        with pytest.raises(ValueError, match="do not fit"):
            measure(x, others, targets)
