"""Round to nearest: the native core against NumPy, and what clipping and importance do to errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import _core
from nybble.checkpoint.encodings import affine, encoding
from nybble.checkpoint.encodings.affine_reference import quantize_groups
from nybble.quantize.rtn import LEAST_IMPORTANCE, column_weights, quantize_rtn, round_rtn

FORMS = st.builds(
    affine.AffineFormat,
    bits=st.sampled_from(affine.BITS),
    group_size=st.sampled_from([16, 24, 32, 64, 128, 264]),
    scale=st.sampled_from(sorted(affine.SCALES)),
    has_zero_point=st.booleans(),
)


def heavy_tailed(shape, seed):
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def squared_error(weight, rounded, importance=1.0):
    return float((importance * (rounded.astype(np.float64) - weight) ** 2).sum())


@pytest.mark.parametrize("level", [name for name, why_not in _core.isa_report().items() if not why_not])
@settings(max_examples=60, deadline=None)
@given(
    form=FORMS,
    seed=st.integers(0, 2**32 - 1),
    search=st.sampled_from(["none", "narrow", "wide"]),
    weighted=st.booleans(),
    kind=st.sampled_from(["normal", "tails", "grid", "one side", "sparse", "tiny", "huge"]),
)
def test_every_search_equals_the_reference_to_the_last_bit(level, form, seed, search, weighted, kind):
    random = np.random.default_rng(seed)
    columns = 2 * form.group_size
    values = random.normal(size=(5, columns)).astype(np.float32)
    if kind == "tails":
        values = heavy_tailed(values.shape, seed)
    elif kind == "grid":
        values = random.integers(-8, 8, values.shape).astype(np.float32) * np.float32(0.37)
    elif kind == "one side":
        values = np.abs(values)
    elif kind == "sparse":
        values[random.random(values.shape) < 0.9] = 0
    elif kind == "tiny":
        values *= np.float32(10.0) ** random.integers(-44, -3, (5, 1)).astype(np.float32)
    elif kind == "huge":
        values *= np.float32(10.0) ** random.integers(0, 38, (5, 1)).astype(np.float32)
    importance = random.lognormal(0, 2, columns).astype(np.float32) if weighted else None
    out = np.empty(encoding(form.name).nbytes(values.size), np.uint8)
    rounded = np.empty(values.size, np.float32)
    fits = _core.quantize_affine(
        values.reshape(-1),
        form.bits,
        form.group_size,
        form.scale,
        form.has_zero_point,
        out,
        level,
        search,
        importance,
        rounded,
    )
    groups = values.reshape(-1, form.group_size)
    weights = None
    if importance is not None:
        weights = np.tile(importance.reshape(2, -1), (5, 1))
    try:
        expected = quantize_groups(groups, form, search, weights)
    except ValueError:
        assert not fits
        return
    assert fits
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(rounded, encoding(form.name).dequantize(out))


@settings(max_examples=60, deadline=None)
@given(FORMS, st.integers(0, 2**32 - 1))
def test_clipping_lowers_the_error(form, seed):
    weight = heavy_tailed((24, 2 * form.group_size), seed)
    plain = round_rtn(weight, form, clipping=False)
    clipped = round_rtn(weight, form)
    slack = 1.05 if form.scale == "bf16" else 1.001  # rounding the scale may cost what the search gains
    limit = squared_error(weight, plain) * slack
    # With 8 bits what bf16 scales lose is all that there is.
    assert squared_error(weight, clipped) <= limit or (form.scale == "bf16" and form.bits == 8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 2**32 - 1))
def test_importance_lowers_the_weighted_error(bits, zero_point, seed):
    form = affine.AffineFormat(bits, 64, "f32", zero_point)
    weight = heavy_tailed((32, 192), seed)
    importance = np.random.default_rng(seed).lognormal(0, 2, 192)
    weighted = round_rtn(weight, form, importance=importance)
    plain = round_rtn(weight, form)
    assert squared_error(weight, weighted, importance) <= squared_error(weight, plain, importance) * 1.0001


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_point", [False, True])
def test_a_whole_row_is_a_group(bits, zero_point):
    form = affine.AffineFormat(bits, 3000, "f16", zero_point)
    weight = np.random.default_rng(0).normal(size=(7, 3000)).astype(np.float32)
    weight[:, 5] *= 12  # far from all others: the best range is a small part of it
    plain = squared_error(weight, round_rtn(weight, form, clipping=False))
    clipped = squared_error(weight, round_rtn(weight, form))
    assert clipped < plain * {2: 0.75, 3: 0.7, 4: 0.6, 8: 1.001}[bits]
    assert quantize_rtn(weight, form).size == encoding(form.name).nbytes(weight.size)


@settings(max_examples=60, deadline=None)
@given(FORMS, st.integers(1, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_values_are_those_of_the_bytes_whatever_the_threads(form, rows, clipping, seed):
    weight = np.random.default_rng(seed).normal(size=(rows, form.group_size)).astype(np.float32)
    data = quantize_rtn(weight, form, clipping=clipping, threads=3)
    np.testing.assert_array_equal(data, quantize_rtn(weight, form, clipping=clipping, threads=1))
    values = encoding(form.name).dequantize(data).reshape(weight.shape)
    np.testing.assert_array_equal(values, round_rtn(weight, form, clipping=clipping, threads=2))


def test_without_clipping_the_extremes_get_the_outermost_codes():
    weight = np.array([[-3.5, 0.5, 1.0, 4.0] * 4], np.float32)
    form = affine.AffineFormat(4, 16, "f32", True)
    np.testing.assert_array_equal(round_rtn(weight, form, clipping=False), weight)
    codes = affine.split(quantize_rtn(weight, form, clipping=False), 16, form).codes
    assert codes.min() == 0
    assert codes.max() == 15
    symmetric = affine.AffineFormat(3, 16, "f32", False)
    rounded = round_rtn(weight, symmetric, clipping=False)
    np.testing.assert_array_equal(rounded, np.array([[-3.0, 0.0, 1.0, 4.0] * 4]))  # steps of -1 from 4


def test_a_matrix_that_is_not_contiguous():
    form = affine.AffineFormat(4, 16, "f16", False)
    wide = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    part = wide[::2, 16:48]
    np.testing.assert_array_equal(quantize_rtn(part, form), quantize_rtn(part.copy(), form))


def test_column_weights():
    np.testing.assert_allclose(column_weights(np.array([1.0, 3.0]), 2), [0.5, 1.5])
    np.testing.assert_array_equal(column_weights(np.zeros(4), 4), np.ones(4))
    assert column_weights(np.array([0.0, 2.0]), 2)[0] == np.float32(LEAST_IMPORTANCE)


def test_refusals():
    form = affine.AffineFormat(4, 32, "f16", False)
    weight = np.zeros((2, 64), np.float32)
    assert not round_rtn(weight, form).any()
    with pytest.raises(ValueError, match="48 columns are not a multiple of the group size 32"):
        quantize_rtn(np.zeros((2, 48), np.float32), form)
    with pytest.raises(ValueError, match="float32 matrix is needed, not float64"):
        quantize_rtn(np.zeros((2, 64)), form)
    with pytest.raises(ValueError, match="there is no encoding int5"):
        quantize_rtn(weight, affine.AffineFormat(5, 32, "f16", False))
    with pytest.raises(ValueError, match="int4_g32_f16_m: methods make scales and zero points"):
        quantize_rtn(weight, affine.AffineFormat(4, 32, "f16", False, True))
    bad = weight.copy()
    bad[1, 7] = np.inf
    with pytest.raises(ValueError, match="row 1, column 7 is inf"):
        round_rtn(bad, form)
    with pytest.raises(ValueError, match="one value for each of 64 columns"):
        quantize_rtn(weight, form, importance=np.ones(63))
    with pytest.raises(ValueError, match="finite and not negative"):
        quantize_rtn(weight, form, importance=np.full(64, -1.0))
    with pytest.raises(ValueError, match="needs clipping=True"):
        quantize_rtn(weight, form, clipping=False, importance=np.ones(64))
    with pytest.raises(ValueError, match="does not fit f16"):
        quantize_rtn(np.full((2, 64), 3e38, np.float32), form)
    with pytest.raises(ValueError, match="threads is 0"):
        quantize_rtn(weight, form, threads=0)
