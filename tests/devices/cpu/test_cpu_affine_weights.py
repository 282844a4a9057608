"""Affine weights on the CPU device: converted without rounding, to the smallest encoding that holds them."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts, join
from nybble.checkpoint.tensor import Tensor
from nybble.devices import cpu, reference
from nybble.devices.cpu.affine_weights import native_weight
from support.random_checkpoints import LLAMA, largest_difference, random_checkpoint, run, tokens


def affine_tensor(form: AffineFormat, scale: float | None = None, codes: tuple[int, int] | None = None):
    """Random codes; scales are normal values rounded to their type, or all ``scale``."""
    random = np.random.default_rng(5)
    rows, groups = 7, 3
    low, high = codes or (0, 2**form.bits - 1)
    values = random.normal(size=(rows, groups)) * 0.01 if scale is None else np.full((rows, groups), scale)
    quantize = encoding(form.scale).quantize
    assert quantize is not None
    scales = quantize(values.astype(np.float32)).reshape(rows, groups, form.scale_bytes)
    shape = (rows, groups * form.group_size)
    minima = None
    if form.has_minimum:
        lowest = (
            random.normal(size=(rows, groups)) * 0.01 if scale is None else np.full((rows, groups), -scale)
        )
        minima = quantize(lowest.astype(np.float32)).reshape(rows, groups, form.scale_bytes)
    parts = AffineParts(
        random.integers(low, high, shape, dtype=np.uint8, endpoint=True),
        scales,
        random.integers(low, high, (rows, groups), dtype=np.uint8, endpoint=True)
        if form.has_zero_point
        else None,
        minima,
    )
    parts.codes[0, :2] = low, high
    return Tensor("w", shape, encoding(form.name), join(parts, form))


@pytest.mark.parametrize(
    ("form", "scale", "codes", "expected"),
    [
        (AffineFormat(4, 32, "f16", False), None, None, "q4_0"),
        (AffineFormat(4, 128, "f16", False), None, None, "q4_0"),
        (AffineFormat(4, 32, "f32", False), None, None, "int4_g32_f32"),
        (AffineFormat(4, 64, "f32", False), None, None, "int4_g32_f32"),
        (AffineFormat(4, 32, "f32", False), 0.25, None, "q4_0"),
        (AffineFormat(4, 32, "f16", True), None, None, "int4_g32_f16_z"),
        (AffineFormat(4, 128, "f16", True), None, None, "int4_g32_f16_z"),
        (AffineFormat(4, 128, "f16", True), None, (8, 8), "q4_0"),
        (AffineFormat(4, 32, "f32", True), None, None, "int4_g32_f32_z"),
        (AffineFormat(4, 96, "f32", True), 0.25, None, "int4_g32_f16_z"),
        (AffineFormat(4, 64, "bf16", True), 1e30, None, "int4_g32_f32_z"),
        (AffineFormat(4, 128, "bf16", False), None, None, "q4_0"),
        (AffineFormat(4, 32, "bf16", False), 2.0**40, None, "int4_g32_f32"),
        (AffineFormat(3, 32, "f16", False), None, None, "q4_0"),
        (AffineFormat(3, 64, "f32", True), None, None, "int4_g32_f32"),
        (AffineFormat(2, 64, "f16", True), None, None, "q4_0"),
        (AffineFormat(8, 96, "f16", False), None, None, "q8_0"),
        (AffineFormat(8, 32, "f32", False), 0.25, None, "q8_0"),
        (AffineFormat(8, 64, "f32", False), None, None, "int8_g32_f32"),
        (AffineFormat(8, 32, "f16", True), None, (100, 200), "q8_0"),
        (AffineFormat(8, 32, "f32", True), None, (100, 200), "int8_g32_f32"),
        (AffineFormat(8, 32, "f16", True), None, None, "f32"),  # differences up to 255
        (AffineFormat(4, 16, "f16", True), 0.125, None, "bf16"),
        (AffineFormat(4, 16, "f16", True), None, None, "f32"),
        (AffineFormat(4, 24, "f32", False), 0.1, None, "f32"),
        (AffineFormat(4, 32, "f16", False, True), None, None, "q4_1"),
        (AffineFormat(4, 128, "f16", False, True), None, None, "q4_1"),
        (AffineFormat(4, 32, "f32", False, True), None, None, "int4_g32_f32_m"),
        (AffineFormat(4, 96, "f32", False, True), None, None, "int4_g32_f32_m"),
        (AffineFormat(4, 32, "f32", False, True), 0.25, None, "q4_1"),
        (AffineFormat(4, 32, "bf16", False, True), 2.0**40, None, "int4_g32_f32_m"),
        (AffineFormat(3, 32, "f16", False, True), None, None, "q4_1"),
        (AffineFormat(2, 64, "f32", False, True), None, None, "int4_g32_f32_m"),
        (AffineFormat(8, 32, "f16", False, True), None, (0, 31), "int8_g32_f32_m"),
        (AffineFormat(8, 32, "f32", False, True), None, (0, 127), "int8_g32_f32_m"),
        (AffineFormat(8, 96, "f32", False, True), None, (0, 127), "int8_g32_f32_m"),
        (AffineFormat(8, 32, "f32", False, True), None, None, "f32"),  # codes above 127
        (AffineFormat(8, 64, "f16", False, True), 0.125, None, "bf16"),
        (AffineFormat(4, 16, "f16", False, True), None, None, "f32"),
    ],
)
def test_values_stay(form: AffineFormat, scale: float | None, codes, expected: str) -> None:
    tensor = affine_tensor(form, scale, codes)
    native = native_weight(tensor)
    assert native.encoding.name == expected
    assert (native.name, native.shape) == (tensor.name, tensor.shape)
    np.testing.assert_array_equal(native.dequantize(), tensor.dequantize())


def test_symmetric_groups_of_32_are_q4_0_blocks() -> None:
    tensor = affine_tensor(AffineFormat(4, 32, "f16", False))
    np.testing.assert_array_equal(native_weight(tensor).data, tensor.data)


@pytest.mark.parametrize(("point", "expected"), [(16, "int4_g32_f16_z"), (17, "f32")])
def test_zero_points_beyond_the_kernels_limit(point: int, expected: str) -> None:
    form = AffineFormat(4, 32, "f16", True)
    tensor = affine_tensor(form)
    data = tensor.data.copy()
    data.reshape(-1, 19)[4, 2] = point
    tensor = tensor.changed(data=data)
    native = native_weight(tensor)
    assert native.encoding.name == expected
    np.testing.assert_array_equal(native.dequantize(), tensor.dequantize())


def test_other_tensors_pass() -> None:
    tensor = Tensor("w", (2, 32), encoding("q4_0"), np.zeros(36, np.uint8))
    assert native_weight(tensor) is tensor


@pytest.mark.parametrize(
    "name",
    [
        "int4_g32_f16",
        "int4_g32_f32",
        "int4_g32_f16_z",
        "int4_g32_f32_z",
        "int4_g16_f16",
        "int8_g32_f32",
        "int8_g32_bf16_z",
        "int3_g16_f32_z",
    ],
)
def test_models_run(name: str) -> None:
    checkpoint = random_checkpoint(LLAMA)
    tensors = dict(checkpoint.tensors)
    row = encoding(name)
    assert row.quantize is not None
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            data = row.quantize(tensor.dequantize())
            tensors[tensor.name] = tensor.changed(encoding=row, data=data)
    checkpoint.tensors = tensors
    ids = tokens(20)
    expected = run(reference.compile_session(checkpoint), ids)
    exact = cpu.compile_session(checkpoint, precision="f32", threads=2)
    assert largest_difference(run(exact, ids), expected) < 1e-4
    assert largest_difference(run(cpu.compile_session(checkpoint, threads=2), ids), expected) < 0.05
