"""Weights of the graph as tensors: packings of ONNX become affine encodings, bit for bit.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
(MatMulNBits, GatherBlockQuantized) and https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import (
    AffineFormat,
    AffineParts,
    affine_encoding,
    join,
    join_sequential,
)
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.onnx.external_data import Initializer
from nybble.formats.onnx.recognise.values import Array, Quantized, Stored, Weight

FLOATS = ("f32", "f16", "bf16")


def weight_of(stored: Initializer) -> Weight:
    """An initializer as a weight: the same place of a data file is the same weight, whatever its name."""
    return Weight(stored.shape, stored.element, stored.load, ("file", stored.place, stored.element))


def matmul_nbits(
    codes: Weight,
    scales: Weight,
    zero_points: Weight | None,
    *,
    rows: int,
    columns: int,
    bits: int,
    block: int,
) -> Quantized:
    """The matrix (rows, columns) of a MatMulNBits; its last block of a row may be padded.

    Raises:
        FormatError: arrays that do not have the sizes that the attributes say.
        UnsupportedError: a width that is not known.
    """
    if bits not in (2, 4, 8) or block < 2 or rows <= 0 or columns <= 0:
        raise UnsupportedError(f"a quantized matrix ({rows}, {columns}) of {bits} bits in blocks of {block}")
    groups = -(-columns // block)
    block_bytes = block * bits // 8
    if codes.element != "u8" or codes.size != rows * groups * block_bytes:
        raise FormatError(f"a quantized matrix ({rows}, {columns}) with {codes.size} bytes of codes")
    if scales.size != rows * groups or scales.element not in FLOATS:
        raise FormatError(
            f"a quantized matrix ({rows}, {columns}) with {scales.size} scales {scales.element}"
        )

    def load_codes() -> Array:
        packed = codes.load().reshape(rows, groups * block_bytes)
        return unpack_low_first(packed, bits)[:, :columns]

    zero: Callable[[], Array] | None = None
    if zero_points is not None:
        zero = _zero_points(zero_points, rows, groups, bits)
    return Quantized(
        (rows, columns), bits, 1, block, scales.element, load_codes,
        lambda: scales.load().reshape(rows, groups), zero,
        ("blocks", codes.key, scales.key, None if zero_points is None else zero_points.key, bits, block),
        (lambda: codes.load().reshape(rows, groups, block_bytes)) if columns % block == 0 else None,
    )  # fmt: skip


def _zero_points(stored: Weight, rows: int, groups: int, bits: int) -> Callable[[], Array]:
    """Zero points as one byte a group: packed like the codes, or floats that are whole numbers."""
    if stored.element == "u8":
        row_bytes = -(-groups * bits // 8)
        if stored.size != rows * row_bytes:
            raise FormatError(f"{stored.size} bytes of zero points; {rows * row_bytes} are needed")
        return lambda: unpack_low_first(stored.load().reshape(rows, row_bytes), bits)[:, :groups]
    if stored.element not in FLOATS or stored.size != rows * groups:
        raise FormatError(f"zero points of type {stored.element}, {stored.size} of them")

    def from_floats() -> Array:
        values = stored.known().reshape(rows, groups)
        points = np.clip(np.rint(values), 0, 2**bits - 1)
        if (points != values).any():
            raise UnsupportedError("zero points that are no whole numbers have no exact form here")
        return points.astype(np.uint8)

    from_floats()  # refused now, not when the weights are first used
    return from_floats


def unpack_low_first(packed: Array, bits: int) -> Array:
    """Codes (rows, n) from bytes (rows, n * bits / 8), lowest bits first."""
    if bits == 8:
        return packed
    count = 8 // bits
    codes = np.empty((*packed.shape, count), np.uint8)
    for place in range(count):
        codes[..., place] = (packed >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    return codes.reshape(packed.shape[0], -1)


def dequantize_linear(
    codes: Weight, scales: Weight, zero_points: Weight | None, *, axis: int, block: int
) -> Quantized:
    """The matrix of a DequantizeLinear: one scale for all, for each index of an axis, or for blocks."""
    if len(codes.shape) != 2 or codes.element not in ("i4", "u4", "i8", "u8"):
        raise UnsupportedError(
            f"DequantizeLinear of {codes.element} {codes.shape}; int4 and int8 matrices are known"
        )
    if scales.element not in FLOATS:
        raise UnsupportedError(f"DequantizeLinear with scales of type {scales.element}")
    if zero_points is not None and (
        zero_points.element != codes.element or zero_points.shape != scales.shape
    ):
        raise FormatError(f"DequantizeLinear: zero points {zero_points.element} {zero_points.shape}")
    rows, columns = codes.shape
    bits = int(codes.element[1])
    signed = codes.element[0] == "i"
    axis %= 2
    if block:
        expected = tuple(-(-dim // block) if at == axis else dim for at, dim in enumerate(codes.shape))
        if scales.shape != expected:
            raise FormatError(f"DequantizeLinear: scales {scales.shape}, expected {expected}")
        group_axis, group, spread = axis, block, None
    elif scales.size == 1:
        group_axis, group, spread = 1, columns, (rows, 1)
    elif scales.shape == (codes.shape[axis],):
        group_axis, group = 1 - axis, codes.shape[1 - axis]
        spread = (rows, 1) if axis == 0 else (1, columns)
    else:
        raise FormatError(f"DequantizeLinear: scales {scales.shape} for {codes.shape} along axis {axis}")

    def shaped(array: Array) -> Array:
        if spread is None:
            return array
        return np.broadcast_to(array.reshape(-1, 1) if spread[1] == 1 else array.reshape(1, -1), spread)

    def unsigned(stored: Weight) -> Array:
        array = stored.load()
        return (array.view(np.uint8) + np.uint8(2 ** (bits - 1))) & np.uint8(2**bits - 1) if signed else array

    zero: Callable[[], Array] | None = None
    if zero_points is not None and not (signed and not zero_points.load().any()):
        points = zero_points
        zero = lambda: shaped(unsigned(points))  # noqa: E731
    elif zero_points is None and not signed:
        zero = lambda: np.zeros(shaped(scales.load()).shape, np.uint8)  # noqa: E731
    elif zero_points is not None and not signed:
        zero = lambda: shaped(unsigned(zero_points))  # noqa: E731
    return Quantized(
        (rows, columns), bits, group_axis, group, scales.element, lambda: unsigned(codes),
        lambda: shaped(scales.load()), zero,
        ("linear", codes.key, scales.key, None if zero_points is None else zero_points.key, axis, block),
    )  # fmt: skip


def join_rows(parts: Sequence[Stored]) -> Stored:
    """Matrices or vectors one under another, as one weight.

    Raises:
        UnsupportedError: they are stored in different ways.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    total = sum(part.shape[0] for part in parts)
    key = ("joined", *(part.key for part in parts))
    if isinstance(first, Weight):
        plain = [part for part in parts if isinstance(part, Weight) and part.element == first.element]
        if len(plain) < len(parts):
            raise UnsupportedError("weights of different types cannot become one")
        return Weight(
            (total, *first.shape[1:]),
            first.element,
            lambda: np.concatenate([part.load() for part in plain]),
            key,
            False,
        )
    alike = [
        part
        for part in parts
        if isinstance(part, Quantized)
        and (part.bits, part.axis, part.group_size, part.scale)
        == (first.bits, 1, first.group_size, first.scale)
        and (part.zero_points is None) == (first.zero_points is None)
        and (part.minima is None) == (first.minima is None)
    ]
    if len(alike) < len(parts):
        raise UnsupportedError("weights of different types cannot become one")
    zero, minima = first.zero_points, first.minima
    packed = first.packed if all(part.packed is not None for part in alike) else None
    return Quantized(
        (total, first.shape[1]), first.bits, 1, first.group_size, first.scale,
        lambda: np.concatenate([part.codes() for part in alike]),
        lambda: np.concatenate([part.scales() for part in alike]),
        None if zero is None else lambda: np.concatenate([part.zero_points() for part in alike]),  # type: ignore[misc]
        key,
        None if packed is None else lambda: np.concatenate([part.packed() for part in alike]),  # type: ignore[misc]
        None if minima is None else lambda: np.concatenate([part.minima() for part in alike]),  # type: ignore[misc]
    )  # fmt: skip


def to_tensor(name: str, stored: Stored) -> Tensor:
    """A weight as a tensor of the checkpoint: (out_features, in_features), or a vector.

    Raises:
        UnsupportedError: it cannot be held exactly.
    """
    if isinstance(stored, Quantized):
        return _affine_tensor(name, stored)
    if stored.element not in FLOATS:
        raise UnsupportedError(f"{name}: a weight of type {stored.element}")

    def data() -> Any:
        return np.ascontiguousarray(stored.load()).reshape(-1).view(np.uint8)

    return Tensor(name, stored.shape, encoding(stored.element), data() if stored.is_view else data)


def _affine_tensor(name: str, stored: Quantized) -> Tensor:
    if stored.axis != 1:
        raise UnsupportedError(f"{name}: its scales are shared along the outputs, not along the inputs")
    rows, columns = stored.shape
    # A last block that is padded: smaller groups, several of which share a scale.
    group = columns if stored.group_size >= columns else math.gcd(columns, stored.group_size)
    repeats = 1 if stored.group_size >= columns else stored.group_size // group
    zero, minima = stored.zero_points, stored.minima
    form = AffineFormat(stored.bits, group, stored.scale, zero is not None, minima is not None)
    try:
        kind = affine_encoding(
            stored.bits, group, stored.scale, zero_point=zero is not None, minimum=minima is not None
        )
    except ValueError as error:
        raise UnsupportedError(f"{name}: {error}") from None
    groups = columns // group
    packed = stored.packed if group == stored.group_size else None

    def data() -> Any:
        def bits_of(array: Array) -> Array:
            spread = np.repeat(array, repeats, axis=1)[:, :groups]
            return np.ascontiguousarray(spread).view(np.uint8).reshape(rows, groups, form.scale_bytes)

        bits = bits_of(stored.scales())
        lowest = None if minima is None else bits_of(minima())
        points = None
        if zero is not None:
            points = np.ascontiguousarray(np.repeat(zero(), repeats, axis=1)[:, :groups])
        if packed is not None:
            return join_sequential(packed(), bits, points, form, lowest)
        return join(AffineParts(np.ascontiguousarray(stored.codes()), bits, points, lowest), form)

    return Tensor(name, stored.shape, kind, data)


def same_numbers(a: Stored, b: Stored) -> bool:
    """Whether two weights hold the same numbers: the same arrays of the file, or equal bytes."""
    if a.key == b.key:
        return True
    if a.shape != b.shape or not isinstance(a, Weight) or not isinstance(b, Weight) or a.element != b.element:
        return False
    first, second = a.load(), b.load()
    some = slice(None, None, max(1, a.shape[0] // 64))
    return bool(np.array_equal(first[some], second[some]) and np.array_equal(first, second))
