"""Group-wise affine integers: packing loses nothing, values are (code - zero point) * scale, or
code * scale + minimum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble import _core
from nybble.checkpoint.encodings import affine, encoding
from nybble.checkpoint.encodings.affine_reference import quantize_groups
from nybble.errors import UnsupportedError

FORMS = st.builds(
    affine.AffineFormat,
    bits=st.sampled_from(affine.BITS),
    group_size=st.sampled_from([8, 16, 32, 64, 128, 96]),
    scale=st.sampled_from(sorted(affine.SCALES)),
    has_zero_point=st.booleans(),
)
ALL_FORMS = FORMS | FORMS.map(lambda form: replace(form, has_zero_point=False, has_minimum=True))


def random_parts(form, rows, groups, seed):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**form.bits, (rows, groups * form.group_size), dtype=np.uint8)
    scales = random.integers(0, 256, (rows, groups, form.scale_bytes), dtype=np.uint8)
    points = random.integers(0, 256, (rows, groups), dtype=np.uint8) if form.has_zero_point else None
    minima = None
    if form.has_minimum:
        minima = random.integers(0, 256, scales.shape, dtype=np.uint8)
    return affine.AffineParts(codes, scales, points, minima)


@given(ALL_FORMS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_parts_survive(form, rows, groups, seed):
    parts = random_parts(form, rows, groups, seed)
    data = affine.join(parts, form)
    row = encoding(form.name)
    assert data.dtype == np.uint8
    assert data.shape == (row.nbytes(rows * groups * form.group_size),)
    again = affine.split(data, groups * form.group_size, form)
    np.testing.assert_array_equal(again.codes, parts.codes)
    np.testing.assert_array_equal(again.scales, parts.scales)
    if form.has_zero_point:
        np.testing.assert_array_equal(again.zero_points, parts.zero_points)
    else:
        assert again.zero_points is None
    if form.has_minimum:
        np.testing.assert_array_equal(again.minima, parts.minima)
    else:
        assert again.minima is None


@given(ALL_FORMS, st.integers(0, 2**32 - 1))
def test_values(form, seed):
    parts = random_parts(form, 3, 2, seed)
    random = np.random.default_rng(seed)
    scales = random.normal(size=(3, 2)).astype(np.float32)
    bits = encoding(form.scale).quantize(scales).reshape(3, 2, form.scale_bytes)
    lowest, minima = None, np.zeros((3, 2), np.float32)
    if form.has_minimum:
        lowest = encoding(form.scale).quantize(random.normal(size=(3, 2)).astype(np.float32))
        minima = encoding(form.scale).dequantize(lowest).reshape(3, 2)
        lowest = lowest.reshape(3, 2, form.scale_bytes)
    data = affine.join(affine.AffineParts(parts.codes, bits, parts.zero_points, lowest), form)
    stored = encoding(form.scale).dequantize(bits.reshape(-1)).reshape(3, 2)
    points = np.float32(0 if form.has_minimum else 2 ** (form.bits - 1))
    if parts.zero_points is not None:
        points = parts.zero_points.astype(np.float32)
    expected = parts.codes.reshape(3, 2, -1).astype(np.float32)
    expected = (expected - np.broadcast_to(points, (3, 2))[..., None]) * stored[..., None]
    expected += minima[..., None]  # rounded once more; adding 0 changes no value
    np.testing.assert_array_equal(encoding(form.name).dequantize(data), expected.reshape(-1))


@given(FORMS, st.integers(0, 2**32 - 1))
def test_order_of_onnx(form, seed):
    codes = random_parts(form, 3, 2, seed).codes.reshape(3, 2, form.group_size)
    bits = np.unpackbits(codes[..., None], axis=-1, count=form.bits, bitorder="little")
    sequential = np.packbits(bits.reshape(3, 2, -1), axis=-1, bitorder="little")
    np.testing.assert_array_equal(affine.from_sequential(sequential, form), affine.pack(codes, form))
    np.testing.assert_array_equal(affine.to_sequential(affine.pack(codes, form), form), sequential)


@given(ALL_FORMS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_joining_packed_codes(form, rows, groups, seed):
    parts = random_parts(form, rows, groups, seed)
    packed = affine.to_sequential(affine.pack(parts.codes.reshape(rows, groups, -1), form), form)
    data = affine.join_sequential(packed, parts.scales, parts.zero_points, form, parts.minima)
    np.testing.assert_array_equal(data, affine.join(parts, form))


def test_joining_refuses_what_does_not_fit():
    form = affine.AffineFormat(4, 32, "f16", True)
    packed, scales, points = (
        np.zeros((2, 3, 16), np.uint8),
        np.zeros((2, 3, 2), np.uint8),
        np.zeros((2, 3), np.uint8),
    )
    assert affine.join_sequential(packed, scales, points, form).shape == (2 * 3 * 19,)
    for wrong in ((packed[:1], scales, points), (packed, scales[..., :1], points), (packed, scales, None)):
        with pytest.raises(ValueError, match=r"int4_g32_f16_z: .* do not fit"):
            affine.join_sequential(*wrong, form)
    with pytest.raises(ValueError, match=r"int4_g32_f16_z: minima do not fit"):
        affine.join_sequential(packed, scales, points, form, scales)
    parts = affine.AffineParts(np.zeros((2, 32), np.uint8), np.zeros((2, 1, 2), np.uint8), None)
    with pytest.raises(ValueError, match=r"int4_g32_f16_m: minima of shape \(2, 1, 2\) are needed"):
        affine.join(parts, affine.AffineFormat(4, 32, "f16", False, True))


def test_minima_lie_and_count_as_in_gguf():
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    theirs = encoding("q4_1").quantize(values.reshape(-1))
    ours = encoding("int4_g32_f16_m").dequantize(theirs)  # same bytes, same meaning
    np.testing.assert_array_equal(ours, encoding("q4_1").dequantize(theirs))
    assert encoding("int4_g32_f16_m").quantize is None


def test_nibbles_lie_as_in_gguf():
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    theirs = encoding("q4_0").quantize(values.reshape(-1)).reshape(-1, 18)
    ours = encoding("int4_g32_f16").dequantize(theirs.reshape(-1))  # same bytes, same meaning
    np.testing.assert_array_equal(ours, encoding("q4_0").dequantize(theirs.reshape(-1)))


@pytest.mark.parametrize("level", [name for name, why_not in _core.isa_report().items() if not why_not])
@given(
    form=FORMS,
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["normal", "grid", "shifted", "one side", "sparse", "tiny", "huge"]),
)
def test_native_rounding_equals_the_reference_to_the_last_bit(level, form, seed, kind):
    random = np.random.default_rng(seed)
    values = random.normal(size=(9, form.group_size)).astype(np.float32)
    if kind == "grid":
        values = random.integers(-8, 8, values.shape).astype(np.float32) * np.float32(0.37)
    elif kind == "shifted":
        values += np.float32(random.normal() * 3)
    elif kind == "one side":
        values = np.abs(values)
    elif kind == "sparse":
        values[random.random(values.shape) < 0.9] = 0
    elif kind == "tiny":
        values *= np.float32(10.0) ** random.integers(-44, -3, (9, 1)).astype(np.float32)
    elif kind == "huge":
        values *= np.float32(10.0) ** random.integers(0, 38, (9, 1)).astype(np.float32)
    out = np.empty(encoding(form.name).nbytes(values.size), np.uint8)
    fits = _core.quantize_affine(
        values.reshape(-1), form.bits, form.group_size, form.scale, form.has_zero_point, out, level
    )
    try:
        expected = quantize_groups(values, form)
    except ValueError:
        assert not fits
        return
    assert fits
    np.testing.assert_array_equal(out, expected)


@given(FORMS, st.integers(0, 2**32 - 1))
def test_the_search_is_better_than_the_largest_value_as_the_step(form, seed):
    values = np.random.default_rng(seed).normal(size=(16, form.group_size)).astype(np.float32)
    row = encoding(form.name)
    error = ((row.dequantize(row.quantize(values)).reshape(values.shape) - values) ** 2).sum(axis=1)
    if form.has_zero_point:
        low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
        step = ((high - low) / (2**form.bits - 1))[:, None]
        zero = np.rint(-low[:, None] / step)
        plain = (np.clip(np.rint(values / step) + zero, 0, 2**form.bits - 1) - zero) * step
    else:
        step = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1) / -form.middle
        plain = np.clip(np.rint(values / step), -form.middle, form.middle - 1) * step
    # Scales of few bits may cost what the search gains.
    slack = {"f32": 1.0001, "f16": 1.001, "bf16": 1.05}[form.scale]
    simple = ((plain - values) ** 2).sum(axis=1)
    assert error.sum() <= simple.sum() * slack + (
        0 if form.scale != "bf16" or form.bits != 8 else 1e-2 * (values**2).sum()
    )


def test_values_on_a_grid_stay():
    random = np.random.default_rng(3)
    codes = random.integers(-8, 8, (64, 32))
    codes[:, 0] = -8
    values = codes * random.normal(size=(64, 1)).astype(np.float32)
    row = encoding("int4_g32_f32")
    np.testing.assert_array_equal(
        row.dequantize(row.quantize(values)).reshape(64, 32), values.astype(np.float32)
    )


def test_zeros_and_refusals():
    row = encoding("int4_g32_f16_z")
    assert not row.dequantize(row.quantize(np.zeros(64, np.float32))).any()
    with pytest.raises(ValueError, match=r"element 3 is nan"):
        row.quantize(np.array([0, 0, 0, np.nan] * 8, np.float32))
    with pytest.raises(ValueError, match="does not fit in f16"):
        row.quantize(np.full(32, 3e38, np.float32))
    with pytest.raises(ValueError, match="not a multiple"):
        row.quantize(np.zeros(33, np.float32))
    with pytest.raises(ValueError, match="not a multiple"):
        row.dequantize(np.zeros(17, np.uint8))


@pytest.mark.parametrize(
    "name",
    [
        "int5_g32_f16",
        "int4_g0_f16",
        "int4_g32_f64",
        "int3_g4_f16",
        "int4_g9999999_f16",
        "int4_g3_f16",
        "int4_g32_f16_zm",
        "int4_g32_m",
    ],
)
def test_unknown_names(name):
    assert affine.affine_format(name) is None
    with pytest.raises(UnsupportedError, match="affine ones such as int4_g32_f16"):
        encoding(name)


def test_row():
    row = encoding("int4_g128_f16_z")
    assert (row.block_size, row.block_bytes, row.ggml_type) == (128, 67, None)
    assert "zero point" in row.layout
    assert affine.affine_encoding(4, 128, "f16", zero_point=True) is row
    row = encoding("int8_g32_f32_m")
    assert (row.block_size, row.block_bytes) == (32, 40)
    assert "minimum" in row.layout
    with pytest.raises(ValueError, match="no encoding int4_g32_f16_z"):
        affine.affine_encoding(4, 32, zero_point=True, minimum=True)
    with pytest.raises(ValueError, match="no encoding int4_g3_f16"):
        affine.affine_encoding(4, 3)


@given(FORMS, st.integers(1, 7))
def test_a_file_packs_zero_points_as_closely_as_codes(form, groups):
    row = encoding(form.name)
    bits = row.block_size * form.bits + 8 * form.scale_bytes * (1 + form.has_minimum)
    if form.has_zero_point:
        bits += form.bits
    assert row.bits_per_weight == bits / row.block_size
    assert row.stored_bytes(groups * row.block_size) == math.ceil(groups * bits / 8)
