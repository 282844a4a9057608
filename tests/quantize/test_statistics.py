"""Means of statistics, with and without tokens."""

from __future__ import annotations

import numpy as np

from nybble.quantize.statistics import InputStatistics


def test_means() -> None:
    seen = InputStatistics(4, np.array([8.0, 2.0]), np.array([2.0, 6.0]))
    assert seen.in_features == 2
    assert seen.mean_squares.tolist() == [2.0, 0.5] and seen.mean_squares.dtype == np.float32
    assert seen.mean_absolute.tolist() == [0.5, 1.5] and seen.mean_absolute.dtype == np.float32
    assert seen.hessian is None


def test_no_tokens() -> None:
    seen = InputStatistics(0, np.zeros(3), np.zeros(3))
    assert not seen.mean_squares.any() and not seen.mean_absolute.any()
