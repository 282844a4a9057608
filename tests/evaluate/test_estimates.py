"""Estimates and their standard errors, against repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nybble.evaluate.estimates import Estimate, exponential, mean, quantile, share
from nybble.evaluate.numerals import estimate, number, percent


def test_mean_and_perplexity() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    found = mean(values)
    assert found.value == 3.0
    assert found.error == pytest.approx(values.std(ddof=1) / 2)
    perplexity = exponential(found)
    assert perplexity.value == pytest.approx(math.exp(3))
    # llama-perplexity: sqrt((E[x^2] - E[x]^2) / (count - 1)) times the perplexity.
    spread = math.sqrt((np.square(values).mean() - 9.0) / 3)
    assert perplexity.error == pytest.approx(spread * math.exp(3))
    assert mean(np.array([5.0])) == Estimate(5.0, 0.0)


def test_a_perplexity_beyond_all_bounds() -> None:
    found = exponential(Estimate(2000.0, 1.0))
    assert found.value == math.inf
    assert found.to_json() == {"value": None, "error": None}
    assert estimate(found) == "inf"


def test_share() -> None:
    found = share(90, 100)
    assert found.value == 0.9
    assert found.error == pytest.approx(math.sqrt(0.9 * 0.1 / 99))
    assert share(0, 1) == Estimate(0.0, 0.0)


@pytest.mark.parametrize("q", [0.5, 0.99])
def test_the_error_of_a_quantile_is_its_spread_over_samples(q: float) -> None:
    random = np.random.default_rng(0)
    found = [quantile(random.exponential(size=2000), q) for _ in range(400)]
    values = np.array([estimate.value for estimate in found])
    assert values.mean() == pytest.approx(-math.log(1 - q), rel=0.01)
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(values.std(), rel=0.15)


def test_a_quantile_of_few_values() -> None:
    assert quantile(np.array([3.0]), 0.99) == Estimate(3.0, 0.0)
    found = quantile(np.array([1.0, 2.0]), 0.99)
    assert 1.9 < found.value <= 2.0 and found.error < 1.0


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Estimate(15.0312, 0.0612), "15.031 ± 0.061"),
        (Estimate(0.332, 0.0079), "0.3320 ± 0.0079"),
        (Estimate(12345.6, 123.4), "12,346 ± 123"),
        (Estimate(1.5e-7, 2e-9), "1.500e-07 ± 2.0e-09"),
        (Estimate(0.0, 0.0), "0"),
        (Estimate(0.25, 0.0), "0.2500"),
        (None, "-"),
    ],
)
def test_how_estimates_are_written(found: Estimate | None, text: str) -> None:
    assert estimate(found) == text


def test_how_numbers_are_written() -> None:
    assert percent(Estimate(0.98321, 0.0012)) == "98.32 ± 0.12 %"
    texts = [number(value) for value in (1234.6, 0.00012346, 1e9, 3.0)]
    assert texts == ["1,235", "0.0001235", "1.000e+09", "3.000"]
