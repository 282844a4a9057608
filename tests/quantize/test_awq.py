"""AWQ: scales and clipping that lower the error of outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.quantize.awq import scaled, search_clipping, search_scales
from nybble.quantize.rtn import round_rtn
from nybble.quantize.statistics import InputStatistics

FORM = AffineFormat(4, 32, "f16", True)


def inputs(tokens, features, seed=0):
    """A few features are much larger than the others."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(tokens, features)) * random.lognormal(0, 1.5, features)).astype(np.float32)


def statistics_of(x):
    return InputStatistics(
        tokens=len(x),
        sum_squares=(x.astype(np.float64) ** 2).sum(axis=0),
        sum_absolute=np.abs(x).sum(axis=0, dtype=np.float64),
        hessian=x.T @ x,
    )


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def output_error(x, weight, values):
    return float(((x.astype(np.float64) @ (values - weight).astype(np.float64).T) ** 2).sum())


def rounding(form=FORM):
    return lambda values: round_rtn(values, form, clipping=False)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 2**32 - 1))
def test_scales_lower_the_error_of_outputs_and_say_by_how_much(bits, zero_point, seed):
    form = AffineFormat(bits, 32, "f32", zero_point)
    x, weights = inputs(300, 96, seed), [matrix(24, 96, seed), matrix(40, 96, seed + 1)]
    found = search_scales(weights, statistics_of(x), rounding(form), rows=1 << 20)
    error = unscaled = 0.0
    for weight in weights:
        error += output_error(x, weight, rounding(form)(weight * found.scales) / found.scales)
        unscaled += output_error(x, weight, rounding(form)(weight))
    assert found.loss == pytest.approx(error, rel=1e-3)
    assert found.loss_unscaled == pytest.approx(unscaled, rel=1e-3)
    assert error < unscaled
    assert 0 < found.ratio < 1
    # Around 1, and larger where inputs are.
    assert found.scales.max() * found.scales.min() == pytest.approx(1, rel=1e-5)
    assert np.corrcoef(np.log(found.scales), np.log(np.abs(x).mean(axis=0)))[0, 1] > 0.999


def test_inputs_of_one_size_need_no_scales():
    x = np.sign(np.random.default_rng(0).normal(size=(200, 64))).astype(np.float32)
    found = search_scales([matrix(16, 64)], statistics_of(x), rounding())
    np.testing.assert_array_equal(found.scales, np.ones(64))
    assert found.loss == found.loss_unscaled


def test_some_rows_say_nearly_what_all_say():
    x, weight = inputs(500, 96), matrix(2000, 96)
    some = search_scales([weight], statistics_of(x), rounding(), rows=256)
    every = search_scales([weight], statistics_of(x), rounding(), rows=1 << 20)
    assert abs(some.ratio - every.ratio) <= 0.1


def test_features_of_one_source_share_a_scale():
    """Two query heads of four features read the same head of v."""
    source = np.concatenate([np.arange(4), np.arange(4)] * 4) + np.repeat(np.arange(4) * 4, 8)
    x, weight = inputs(200, 32), matrix(16, 32)
    found = search_scales([weight], statistics_of(x), rounding(), source=source)
    assert found.scales.shape == (16,)
    sums = np.abs(x).sum(axis=0)
    means = [sums[source == i].mean() for i in range(16)]
    assert np.corrcoef(np.log(found.scales), np.log(means))[0, 1] > 0.999


def test_features_that_were_never_seen_are_scaled_as_the_least_that_were():
    x = inputs(200, 64)
    x[:, [3, 17]] = 0
    found = search_scales([matrix(16, 64)], statistics_of(x), rounding())
    assert np.isfinite(found.scales).all()
    assert found.scales[3] == found.scales[17] == found.scales.min()
    nothing = search_scales([matrix(16, 64)], statistics_of(np.zeros((5, 64), np.float32)), rounding())
    np.testing.assert_array_equal(nothing.scales, np.ones(64))


# The same matrices always: what is searched is each group's own error, and the output's follows mostly.
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 2**32 - 1))
def test_clipping_lowers_the_error_of_outputs(bits, zero_point, seed):
    form = AffineFormat(bits, 32, "f32", zero_point)
    x = inputs(300, 96, seed)
    weight = np.random.default_rng(seed).standard_t(3, (20, 96)).astype(np.float32)
    clipped = search_clipping(weight, statistics_of(x), form)
    assert (np.abs(clipped) <= np.abs(weight)).all()
    largest = np.abs(weight.reshape(20, 3, 32)).max(axis=2)
    assert (np.abs(clipped.reshape(20, 3, 32)).max(axis=2) >= 0.5 * largest).all()
    ours = output_error(x, weight, round_rtn(clipped, form, clipping=False))
    assert ours < output_error(x, weight, round_rtn(weight, form, clipping=False))


def test_clipping_by_hand():
    """One large weight meets an input that is always 0: only the others count."""
    weight = np.full((1, 32), 0.3, np.float32)
    weight[0, 5] = 0.8
    x = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
    x[:, 5] = 0
    clipped = search_clipping(weight, statistics_of(x), AffineFormat(2, 32, "f32", True))
    assert clipped[0, 5] == pytest.approx(0.44)  # steps of 0.147, two of which are nearly 0.3
    np.testing.assert_array_equal(np.delete(clipped, 5), np.delete(weight[0], 5))


def test_statistics_of_divided_inputs():
    x, scales = inputs(50, 16), np.random.default_rng(1).lognormal(0, 1, 16).astype(np.float32)
    ours, expected = scaled(statistics_of(x), scales), statistics_of(x / scales)
    assert ours.tokens == 50
    np.testing.assert_allclose(ours.sum_squares, expected.sum_squares, rtol=1e-5)
    np.testing.assert_allclose(ours.sum_absolute, expected.sum_absolute, rtol=1e-5)
    np.testing.assert_allclose(ours.hessian, expected.hessian, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0"])
def test_scales_for_any_rounding(name):
    row = encoding(name)
    assert row.quantize is not None

    def q(values):
        return row.dequantize(row.quantize(values.reshape(-1))).reshape(values.shape)

    x, weight = inputs(300, 96), matrix(24, 96)
    found = search_scales([weight], statistics_of(x), q)
    assert found.loss < found.loss_unscaled


def test_refusals():
    x, weight = inputs(20, 64), matrix(8, 64)
    statistics = statistics_of(x)
    without = InputStatistics(20, statistics.sum_squares, statistics.sum_absolute, None)
    with pytest.raises(ValueError, match="collect the statistics with hessian=True"):
        search_scales([weight], without, rounding())
    with pytest.raises(ValueError, match="collect the statistics with hessian=True"):
        search_clipping(weight, without, FORM)
    with pytest.raises(ValueError, match="saw no tokens"):
        search_scales([weight], statistics_of(x[:0]), rounding())
    with pytest.raises(ValueError, match=r"shape \(8, 32\) for 64 input features"):
        search_scales([weight[:, :32]], statistics, rounding())
    with pytest.raises(ValueError, match="no matrices"):
        search_scales([], statistics, rounding())
    with pytest.raises(ValueError, match="64 input features for a matrix of 32 columns"):
        search_clipping(weight[:, :32].copy(), statistics, FORM)
