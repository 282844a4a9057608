"""Affine weights (AWQ, GPTQ, compressed-tensors, ONNX) in an encoding that the CPU's kernels know.

Converted once when a model is loaded, and never rounded: each step below takes a weight only if every
value stays what it is. Groups of more than 32 repeat their scale in each block of 32.

    codes of 4 bits     q4_0 or int4_g32_f32; with zero points int4_g32_f16_z or int4_g32_f32_z
    2, 3 and 8 bits     codes less zero points in q4_0, q8_0, int4_g32_f32 or int8_g32_f32
    with minima         q4_1, int4_g32_f32_m or int8_g32_f32_m
    groups not of 32    bf16 where it holds the values
    anything else       f32
"""

from __future__ import annotations

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
"""Elements of a block in the kernels' encodings."""
MAX_ZERO_POINT = 16
"""The kernels' limit (``max_zero_point`` in native/core/encoding.h)."""
MAX_CODE_WITH_MINIMUM = 127
"""The same for codes of 8 bits beside a minimum (``max_code_with_minimum``)."""
_CHUNK = 1 << 22  # elements worked on at a time


def native_weight(tensor: Tensor) -> Tensor:
    """The same values in an encoding with CPU kernels; a tensor that is not affine is returned as it is."""
    form = affine_format(tensor.encoding.name)
    if form is None or len(tensor.shape) != 2:
        return tensor
    data = tensor.data
    tensor = tensor.changed(data=data)
    if form.group_size % BLOCK == 0:
        blocks = data.reshape(-1, form.header_bytes + form.code_bytes)
        if form.has_minimum:
            found = _with_minima(blocks, form)
        else:
            found = _same_codes(blocks, form) or _differences(blocks, form)
        if found is not None:
            name, converted = found
            same = converted is data or encoding(name) is tensor.encoding
            return tensor if same else tensor.changed(encoding=encoding(name), data=converted)
    rounded = _bf16(data, tensor.shape, form)
    if rounded is not None:
        return tensor.changed(encoding=encoding("bf16"), data=rounded)
    f32 = encoding("f32")
    return tensor.changed(encoding=f32, data=tensor.encoding.dequantize(data).view(np.uint8))


def _same_codes(blocks: Bytes, form: AffineFormat) -> tuple[str, Bytes] | None:
    """Codes stay as they are; only what stands before them changes."""
    points = _zero_points(blocks, form)
    if form.bits not in (4, 8) or (form.bits == 8 and points is not None):
        return None
    if points is not None and points.max(initial=0) > MAX_ZERO_POINT:
        return None
    scales, kind = _scales(blocks, form)
    name = f"int{form.bits}_g32_{kind}" + ("" if points is None else "_z")
    name = {"int4_g32_f16": "q4_0", "int8_g32_f16": "q8_0"}.get(name, name)
    same_header = scales.shape[1] == form.scale_bytes and (points is not None) == form.has_zero_point
    if form.group_size == BLOCK and same_header and name != "q8_0":
        return name, blocks.reshape(-1)
    header = scales if points is None else np.concatenate([scales, points[:, None]], axis=1)
    out = _empty(len(blocks), form, header.shape[1] + BLOCK * form.bits // 8)
    out[:, :, : header.shape[1]] = header[:, None]
    codes = out[:, :, header.shape[1] :]
    codes[...] = blocks[:, form.header_bytes :].reshape(codes.shape)
    if name == "q8_0":  # signed there
        codes ^= np.uint8(128)
    return name, out.reshape(-1)


def _with_minima(blocks: Bytes, form: AffineFormat) -> tuple[str, Bytes] | None:
    """Codes with minima: of 4 bits (from 2 and 3) or of 8, whose highest bit the kernels want clear."""
    scales, scale_kind = _half_or_single(blocks[:, : form.scale_bytes], form)
    minima, kind = _half_or_single(blocks[:, form.scale_bytes : form.header_bytes], form)
    if form.bits != 8 and scale_kind == kind == "f16":
        name = "q4_1"
    else:
        name = "int8_g32_f32_m" if form.bits == 8 else "int4_g32_f32_m"
        scales, minima = (
            scale_values(np.ascontiguousarray(blocks[:, at : at + form.scale_bytes]), form)
            .astype("<f4")
            .view(np.uint8)
            .reshape(-1, 4)
            for at in (0, form.scale_bytes)
        )
    header = np.concatenate([scales, minima], axis=1)
    if form.bits in (4, 8) and form.group_size == BLOCK and header.shape[1] == form.header_bytes:
        codes = blocks[:, form.header_bytes :]
        fits = form.bits == 4 or codes.max(initial=0) <= MAX_CODE_WITH_MINIMUM
        return (name, blocks.reshape(-1)) if fits else None
    out = _empty(len(blocks), form, header.shape[1] + (BLOCK if form.bits == 8 else BLOCK // 2))
    out[:, :, : header.shape[1]] = header[:, None]
    step = max(1, _CHUNK // form.group_size)
    for start in range(0, len(blocks), step):
        parts = split(blocks[start : start + step].reshape(-1), form.group_size, form)
        target = out[start : start + step, :, header.shape[1] :]
        codes = parts.codes.reshape(*target.shape[:2], BLOCK)
        if form.bits == 8:
            if codes.max(initial=0) > MAX_CODE_WITH_MINIMUM:
                return None
            target[...] = codes
        else:
            target[...] = codes[..., :16] | (codes[..., 16:] << np.uint8(4))
    return name, out.reshape(-1)


def _differences(blocks: Bytes, form: AffineFormat) -> tuple[str, Bytes] | None:
    """Codes less zero points, as signed numbers of 4 bits (from 2 and 3) or of 8."""
    half = 128 if form.bits == 8 else 8
    scales, kind = _scales(blocks, form)
    name = {8: {"f16": "q4_0", "f32": "int4_g32_f32"}, 128: {"f16": "q8_0", "f32": "int8_g32_f32"}}[half][
        kind
    ]
    header = scales.shape[1]
    out = _empty(len(blocks), form, header + (BLOCK if half == 128 else BLOCK // 2))
    out[:, :, :header] = scales[:, None]
    step = max(1, _CHUNK // form.group_size)
    for start in range(0, len(blocks), step):
        parts = split(blocks[start : start + step].reshape(-1), form.group_size, form)
        codes = parts.codes.astype(np.int16)
        codes -= np.int16(form.middle) if parts.zero_points is None else parts.zero_points
        if codes.min() < -half or codes.max() >= half:
            return None
        target = out[start : start + step, :, header:]
        if name == "q8_0":
            target[...] = codes.astype(np.int8).view(np.uint8).reshape(target.shape)
            continue
        unsigned = (codes + np.int16(half)).astype(np.uint8).reshape(*target.shape[:2], BLOCK)
        if half == 8:
            unsigned = unsigned[..., :16] | (unsigned[..., 16:] << np.uint8(4))
        target[...] = unsigned
    return name, out.reshape(-1)


def _empty(groups: int, form: AffineFormat, block_bytes: int) -> Bytes:
    return np.empty((groups, form.group_size // BLOCK, block_bytes), np.uint8)


def _scales(blocks: Bytes, form: AffineFormat) -> tuple[Bytes, str]:
    """Bytes of the scales (groups, 2 or 4) and their type: float16 if it holds them all, or float32."""
    return _half_or_single(blocks[:, : form.scale_bytes], form)


def _half_or_single(numbers: Bytes, form: AffineFormat) -> tuple[Bytes, str]:
    stored = np.ascontiguousarray(numbers)
    if form.scale == "f16":
        return stored, "f16"
    values = scale_values(stored, form)
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if np.array_equal(half.astype(np.float32), values):
        return half.view(np.uint8).reshape(-1, 2), "f16"
    return values.astype("<f4").view(np.uint8).reshape(-1, 4), "f32"


def _zero_points(blocks: Bytes, form: AffineFormat) -> Bytes | None:
    """Zero points (groups), or None where all are in the middle."""
    if not form.has_zero_point:
        return None
    points = np.ascontiguousarray(blocks[:, form.scale_bytes])
    return None if (points == form.middle).all() else points


def _bf16(data: Bytes, shape: tuple[int, ...], form: AffineFormat) -> Bytes | None:
    """All values as bfloat16; None where one does not fit."""
    rows, columns = shape
    out = np.empty((rows, 2 * columns), np.uint8)
    encoded = data.reshape(rows, -1)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        parts = split(np.ascontiguousarray(encoded[start : start + step]).reshape(-1), columns, form)
        bits = _values(parts, form).view(np.uint32)
        if (bits & np.uint32(0xFFFF)).any():
            return None
        upper = (bits >> np.uint32(16)).astype("<u2").view(np.uint8)
        out[start : start + step] = upper.reshape(-1, 2 * columns)
    return out.reshape(-1)


def _values(parts: AffineParts, form: AffineFormat) -> npt.NDArray[np.float32]:
    codes = parts.codes.reshape(*parts.scales.shape[:2], form.group_size).astype(np.float32)
    scales = scale_values(parts.scales, form)[..., None]
    zero = np.float32(form.middle) if parts.zero_points is None else parts.zero_points[..., None]
    with np.errstate(all="ignore"):
        if parts.minima is not None:
            return np.asarray(codes * scales + scale_values(parts.minima, form)[..., None], np.float32)
        values: npt.NDArray[np.float32] = (codes - zero) * scales
    return values
