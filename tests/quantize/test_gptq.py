"""GPTQ: blocks and native rounding against the plain loop, and errors of outputs against rounding alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import _core
from nybble.checkpoint.encodings import affine, encoding
from nybble.quantize.gptq import DAMPING, factorize, quantize_blocks_gptq, quantize_gptq
from nybble.quantize.gptq_reference import round_with_feedback
from nybble.quantize.inverse_factor import inverse_factor
from nybble.quantize.rtn import round_rtn

LEVELS = [name for name, why_not in _core.isa_report().items() if not why_not]
FORM = affine.AffineFormat(4, 32, "f16", True)


def inputs(tokens, features, seed=0):
    """Correlated inputs, a few features much larger than the others."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(features // 4, features)) + 0.3 * random.normal(size=features)
    x = random.normal(size=(tokens, features // 4)) @ mix + 0.3 * random.normal(size=(tokens, features))
    return (x * random.lognormal(0, 1, features)).astype(np.float32)


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def values_of(result, form, shape):
    """The matrix for inputs in their own order."""
    values = encoding(form.name).dequantize(result.data).reshape(shape)
    if result.permutation is None:
        return values
    back = np.empty_like(values)
    back[:, result.permutation] = values
    return back


def output_error(x, weight, values):
    return float(((x.astype(np.float64) @ (values - weight).astype(np.float64).T) ** 2).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_the_factor_is_that_of_the_inverse(size, seed):
    x = np.random.default_rng(seed).normal(size=(2 * size, size))
    hessian = x.T @ x + 0.01 * np.eye(size)
    upper = inverse_factor(hessian)
    assert not np.tril(upper, -1).any()
    assert (np.diagonal(upper) > 0).all()
    np.testing.assert_allclose(upper.T @ upper @ hessian, np.eye(size), atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    groups=st.integers(1, 4),
    bits=st.sampled_from(affine.BITS),
    seed=st.integers(0, 2**32 - 1),
)
def test_native_rounding_equals_the_plain_loop_to_the_last_bit(level, rows, columns, groups, bits, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, columns)).astype(np.float32)
    factor = np.triu(random.normal(size=(columns, columns)) * 0.3).astype(np.float32)
    factor[np.diag_indices(columns)] = random.uniform(0.5, 2, columns)
    scales = random.uniform(0.05, 0.5, (rows, groups)).astype(np.float32)
    scales[random.random(scales.shape) < 0.1] = 0
    points = random.integers(0, 2**bits, (rows, groups)).astype(np.float32)
    group_of = random.integers(0, groups, columns).astype(np.int32)
    codes, errors = np.empty(values.shape, np.uint8), np.empty_like(values)
    _core.round_with_feedback(values, factor, scales, points, group_of, bits, codes, errors, level)
    expected = round_with_feedback(
        values, factor, lambda j, _: (scales[:, group_of[j]], points[:, group_of[j]]), bits
    )
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(errors, expected[1])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize(("group_size", "block"), [(16, 64), (32, 40), (64, 48), (192, 50), (96, 1)])
def test_blocks_equal_the_plain_loop(act_order, static_groups, group_size, block):
    """The same loop over all columns at once, with the scales that the result says."""
    form = affine.AffineFormat(4, group_size, "f16", True)
    weight, x = matrix(19, 192), inputs(400, 192)
    factor = factorize(x.T @ x, act_order=act_order)
    result = quantize_gptq(weight, factor, form, static_groups=static_groups, block=block, threads=2)
    static = static_groups or group_size == 192  # one group: its scales are always found first
    assert (result.permutation is not None) == (act_order and not static)
    parts = affine.split(result.data, 192, form)
    scales = affine.scale_values(parts.scales, form)
    order = np.arange(192) if factor.order is None else factor.order
    group_of = (order if static else np.arange(192)) // group_size

    def grid(j, _):
        group = group_of[j]
        return scales[:, group], parts.zero_points[:, group].astype(np.float32)

    codes, errors = round_with_feedback(weight[:, order], factor.upper, grid, 4)
    ours = parts.codes[:, order] if static else parts.codes
    # Sums in another order may put a value that lies between two codes to the other one.
    assert (codes != ours).mean() < 0.02
    assert result.loss == pytest.approx(float((errors**2).sum()), rel=0.02)


@pytest.mark.parametrize("clipping", [False, True])
def test_a_groups_scales_come_from_the_values_as_they_are_by_then(clipping):
    """The first group's are those of rounding alone; the second's see the feedback."""
    weight, x = matrix(8, 64), inputs(200, 64)
    factor = factorize(x.T @ x)
    form = affine.AffineFormat(4, 32, "f32", True)
    result = quantize_gptq(weight, factor, form, clipping=clipping)
    parts = affine.split(result.data, 64, form)
    scales = affine.scale_values(parts.scales, form)
    if not clipping:
        spread = np.maximum(weight[:, :32].max(axis=1), 0) - np.minimum(weight[:, :32].min(axis=1), 0)
        np.testing.assert_allclose(scales[:, 0], spread / 15, rtol=1e-6)
        spread = np.maximum(weight[:, 32:].max(axis=1), 0) - np.minimum(weight[:, 32:].min(axis=1), 0)
        assert (np.abs(scales[:, 1] / (spread / 15) - 1) > 1e-3).any()
    values = values_of(result, form, weight.shape)
    assert output_error(x, weight, values) < result.loss * 1.0001


# The same matrices always: feedback is greedy, and helps nearly every matrix, not each.
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([16, 32, 64, 128]),
    zero_point=st.booleans(),
    act_order=st.booleans(),
    static_groups=st.booleans(),
    clipping=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_outputs_are_nearer_than_by_rounding_alone(
    bits, group_size, zero_point, act_order, static_groups, clipping, seed
):
    form = affine.AffineFormat(bits, group_size, "f32", zero_point)
    weight, x = matrix(24, 128, seed), inputs(512, 128, seed)
    factor = factorize(x.T @ x, act_order=act_order)
    result = quantize_gptq(weight, factor, form, static_groups=static_groups, clipping=clipping)
    ours = output_error(x, weight, values_of(result, form, weight.shape))
    assert ours < output_error(x, weight, round_rtn(weight, form, clipping=clipping))
    assert ours <= result.loss * 1.0001  # the loss counts the damping too


def test_inputs_that_are_not_correlated_leave_rounding_alone():
    weight = matrix(8, 64)
    result = quantize_gptq(weight, factorize(np.eye(64, dtype=np.float32)), FORM, clipping=False)
    np.testing.assert_array_equal(
        values_of(result, FORM, weight.shape), round_rtn(weight, FORM, clipping=False)
    )


def test_two_columns_by_hand():
    """x1 = x2: what the first column lost, the second one takes over nearly all of."""
    x = np.ones((10, 1)) @ np.ones((1, 2))
    factor = factorize(np.pad(x.T @ x, (0, 6)) + np.diag([0.0] * 2 + [10.0] * 6), damping=1e-6)
    weight = np.zeros((1, 8), np.float32)
    weight[0] = [1.4, 1.4, 7, -8, 0, 0, 0, 0]
    form = affine.AffineFormat(4, 8, "f32", False)
    values = values_of(quantize_gptq(weight, factor, form, clipping=False), form, (1, 8))
    np.testing.assert_allclose(values, [[1, 2, 7, -8, 0, 0, 0, 0]])  # 1.4 + 0.4 = 1.8


def test_features_that_were_never_seen():
    weight, x = matrix(8, 64), inputs(300, 64)
    x[:, [3, 40]] = 0
    factor = factorize(x.T @ x)
    assert factor.unseen == 2
    result = quantize_gptq(weight, factor, FORM)
    values = values_of(result, FORM, weight.shape)
    parts = affine.split(result.data, 64, FORM)
    step = affine.scale_values(parts.scales, FORM)
    # Nearest code where the range reaches, and nothing else depends on them.
    reached = np.abs(values[:, 3] - weight[:, 3]) <= step[:, 0] / 2 + 1e-6
    assert reached.mean() > 0.5
    other = weight.copy()
    other[:, 40] = 0
    again = quantize_gptq(other, factor, FORM, static_groups=False, clipping=False)
    plain = quantize_gptq(weight, factor, FORM, static_groups=False, clipping=False)
    np.testing.assert_array_equal(
        values_of(again, FORM, weight.shape)[:, :32], values_of(plain, FORM, weight.shape)[:, :32]
    )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("act_order", [False, True])
def test_fewer_tokens_than_features(tokens, act_order):
    weight, x = matrix(8, 64), inputs(tokens, 64)
    factor = factorize(x.T @ x, act_order=act_order)
    assert factor.damping == DAMPING
    values = values_of(quantize_gptq(weight, factor, FORM), FORM, weight.shape)
    assert output_error(x, weight, values) < 0.1 * output_error(x, weight, round_rtn(weight, FORM))


def test_no_inputs_at_all():
    weight = matrix(4, 64)
    factor = factorize(np.zeros((64, 64), np.float32))
    assert factor.unseen == 64
    result = quantize_gptq(weight, factor, FORM, clipping=False)
    np.testing.assert_array_equal(
        values_of(result, FORM, weight.shape), round_rtn(weight, FORM, clipping=False)
    )


def test_a_matrix_that_rounding_made_indefinite_is_damped_more():
    x = inputs(4, 64).astype(np.float64)
    hessian = (x.T @ x).astype(np.float32)
    hessian += np.diag(np.full(64, -0.02 * np.diagonal(hessian).mean(), np.float32))
    np.fill_diagonal(hessian, np.maximum(np.diagonal(hessian), 0))
    assert factorize(hessian, damping=0.01).damping > 0.01


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_blocks_of_ggufs_types_with_feedback(name):
    """Feedback looks one block ahead, so that it helps nearly every matrix, and all of them together."""
    row = encoding(name)
    assert row.quantize is not None
    seen, totals = [], np.zeros(2)

    def quantize(values, importance):
        assert values.shape == (16, 32)
        seen.append(importance.shape)
        return row.quantize(values.reshape(-1))

    for seed in range(8):
        weight, x = matrix(16, 128, seed), inputs(512, 128, seed)
        result = quantize_blocks_gptq(weight, factorize(x.T @ x), row, quantize)
        values = row.dequantize(result.data).reshape(weight.shape)
        plain = row.dequantize(row.quantize(weight.reshape(-1))).reshape(weight.shape)
        ours = output_error(x, weight, values)
        assert ours <= result.loss * 1.0001
        totals += ours, output_error(x, weight, plain)
    assert seen == [(32,)] * 4 * 8
    assert totals[0] < 0.9 * totals[1]


def test_refusals():
    weight, hessian = matrix(4, 64), np.eye(64, dtype=np.float32)
    factor = factorize(hessian)
    with pytest.raises(ValueError, match="damping is 0"):
        factorize(hessian, damping=0)
    with pytest.raises(ValueError, match="square matrix is needed"):
        factorize(hessian[:5])
    with pytest.raises(ValueError, match="finite"):
        factorize(np.full((4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="diagonal not negative"):
        factorize(-hessian)
    with pytest.raises(ValueError, match="not positive, even with its mean diagonal added"):
        factorize(np.full((4, 4), -1.0) + 2 * np.diag([1.0, 1, 1, 1]) - 6 * np.eye(4)[::-1])
    with pytest.raises(ValueError, match="of 64 input features, the matrix has 32"):
        quantize_gptq(weight[:, :32].copy(), factor, FORM)
    with pytest.raises(ValueError, match="a block of 0 columns"):
        quantize_gptq(weight, factor, FORM, block=0)
    bad = weight.copy()
    bad[2, 3] = np.nan
    with pytest.raises(ValueError, match="row 2, column 3 is nan"):
        quantize_gptq(bad, factor, FORM)
    with pytest.raises(ValueError, match="does not fit f16"):
        quantize_gptq(np.full((4, 64), 3e38, np.float32), factor, FORM)
    ordered = factorize(hessian, act_order=True)
    q4_0 = encoding("q4_0")
    with pytest.raises(ValueError, match="act_order needs an affine encoding"):
        quantize_blocks_gptq(weight, ordered, q4_0, lambda v, i: v)
    with pytest.raises(ValueError, match="64 columns are not a multiple of its block of 256"):
        quantize_blocks_gptq(weight, factor, encoding("q4_k"), lambda v, i: v)
