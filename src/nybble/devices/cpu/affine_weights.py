"""Affine weights (AWQ, GPTQ, compressed-tensors, ONNX) in an encoding that the CPU's kernels know.

Converted once when a model is loaded, and never rounded: each step below takes a weight only if every
value stays what it is.

    codes - zero points of 4 bits, scales that float16 holds, groups of whole 32   q4_0
    the same with 8 bits                                                           q8_0
    values that bfloat16 holds                                                     bf16
    anything else                                                                  f32
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import (
    AffineFormat,
    AffineParts,
    affine_format,
    scale_values,
    split,
)
from nybble.checkpoint.tensor import Tensor

Bytes = npt.NDArray[np.uint8]

BLOCK = 32
"""Elements of a q4_0 or q8_0 block."""
_CHUNK = 1 << 22  # elements worked on at a time
_Convert = Callable[[AffineParts, AffineFormat], Bytes | None]


def native_weight(tensor: Tensor) -> Tensor:
    """The same values in an encoding with CPU kernels; a tensor that is not affine is returned as it is."""
    form = affine_format(tensor.encoding.name)
    if form is None or len(tensor.shape) != 2:
        return tensor
    data = tensor.data
    for name, convert in (("q4_0", _q4_0), ("q8_0", _q8_0), ("bf16", _bf16)):
        converted = _by_rows(data, tensor.shape, form, name, convert)
        if converted is not None:
            return tensor.changed(encoding=encoding(name), data=converted)
    f32 = encoding("f32")
    return tensor.changed(encoding=f32, data=tensor.encoding.dequantize(data).view(np.uint8))


def _by_rows(
    data: Bytes, shape: tuple[int, ...], form: AffineFormat, name: str, convert: _Convert
) -> Bytes | None:
    """All rows converted, some at a time; None as soon as one does not fit."""
    rows, columns = shape
    if columns % encoding(name).block_size or (name != "bf16" and form.group_size % BLOCK):
        return None
    stride = encoding(name).nbytes(columns)
    out = np.empty((rows, stride), np.uint8)
    step = max(1, _CHUNK // columns)
    encoded = data.reshape(rows, -1)
    for start in range(0, rows, step):
        part = np.ascontiguousarray(encoded[start : start + step]).reshape(-1)
        converted = convert(split(part, columns, form), form)
        if converted is None:
            return None
        out[start : start + step] = converted.reshape(-1, stride)
    return out.reshape(-1)


def _q4_0(parts: AffineParts, form: AffineFormat) -> Bytes | None:
    """Scale and 16 bytes: code i low and code i + 16 high in byte i; value = (code - 8) * scale."""
    blocks = _blocks(parts, form, -8, 7)
    if blocks is None:
        return None
    scales, codes = blocks
    unsigned = (codes + np.int16(8)).astype(np.uint8)
    nibbles = unsigned[..., :16] | (unsigned[..., 16:] << np.uint8(4))
    return np.concatenate([scales, nibbles], axis=-1)


def _q8_0(parts: AffineParts, form: AffineFormat) -> Bytes | None:
    """Scale and 32 signed bytes; value = code * scale."""
    blocks = _blocks(parts, form, -128, 127)
    if blocks is None:
        return None
    scales, codes = blocks
    return np.concatenate([scales, codes.astype(np.int8).view(np.uint8)], axis=-1)


def _blocks(
    parts: AffineParts, form: AffineFormat, lowest: int, highest: int
) -> tuple[Bytes, npt.NDArray[np.int16]] | None:
    """float16 scales uint8 (rows, blocks, 2) and codes less zero points (rows, blocks, 32).

    None where a scale is no float16 or a code is out of range.
    """
    rows, groups = parts.scales.shape[:2]
    scales = parts.scales
    if form.scale != "f16":
        values = scale_values(parts.scales, form)
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.array_equal(half.astype(np.float32), values):
            return None
        scales = half.view(np.uint8).reshape(rows, groups, 2)
    codes = parts.codes.reshape(rows, groups, form.group_size).astype(np.int16)
    codes -= np.int16(form.middle) if parts.zero_points is None else parts.zero_points[..., None]
    if codes.min() < lowest or codes.max() > highest:
        return None
    repeats = form.group_size // BLOCK
    return np.repeat(scales, repeats, axis=1), codes.reshape(rows, groups * repeats, BLOCK)


def _bf16(parts: AffineParts, form: AffineFormat) -> Bytes | None:
    codes = parts.codes.reshape(*parts.scales.shape[:2], form.group_size).astype(np.float32)
    zero = np.float32(form.middle) if parts.zero_points is None else parts.zero_points[..., None]
    with np.errstate(all="ignore"):
        values = (codes - zero) * scale_values(parts.scales, form)[..., None]
    bits = values.view(np.uint32)
    if (bits & np.uint32(0xFFFF)).any():
        return None
    upper: Bytes = (bits >> np.uint32(16)).astype("<u2").view(np.uint8)
    return upper
