"""Plain numbers: one element a block, no scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import as_bytes

_SPEC = "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (enum ggml_type)"


def _plain(
    name: str, ggml_type: int, dtype: str, layout: str, quantize: Callable[[Floats], Bytes]
) -> Encoding:
    size = np.dtype(dtype).itemsize

    def dequantize(data: Bytes) -> Floats:
        flat = _whole(name, data, size)
        with np.errstate(all="ignore"):
            return flat.view(dtype).astype(np.float32)

    return Encoding(name, 1, size, dequantize, quantize, layout, _SPEC, ggml_type)


def _whole(name: str, data: Bytes, size: int) -> Bytes:
    flat = as_bytes(name, data)
    if flat.size % size:
        raise ValueError(f"{name}: {flat.size} bytes are not a multiple of the element's {size} bytes")
    return np.ascontiguousarray(flat)


def _to_float(dtype: str) -> Callable[[Floats], Bytes]:
    def quantize(values: Floats) -> Bytes:
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=np.float32).reshape(-1).astype(dtype).view(np.uint8)

    return quantize


def _to_integer(name: str, dtype: str) -> Callable[[Floats], Bytes]:
    def quantize(values: Floats) -> Bytes:
        flat = np.asarray(values, dtype=np.float32).reshape(-1).astype(np.float64)
        if np.isnan(flat).any():
            raise ValueError(f"{name}: element {int(np.flatnonzero(np.isnan(flat))[0])} is not a number")
        limits = np.iinfo(dtype)
        # The largest int64 is no float64: the next one below is the last that converts.
        highest = float(limits.max) if limits.bits < 64 else np.nextafter(2.0**63, 0)
        return np.clip(np.rint(flat), float(limits.min), highest).astype(dtype).view(np.uint8)

    return quantize


def _dequantize_bf16(data: Bytes) -> Floats:
    return (_whole("bf16", data, 2).view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _quantize_bf16(values: Floats) -> Bytes:
    """Rounds to nearest even; a NaN stays one and becomes quiet."""
    bits = np.asarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    rounded = (
        bits.astype(np.uint64) + np.uint64(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    ) >> np.uint64(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(nan, quiet, rounded).astype("<u2").view(np.uint8)


ROWS: tuple[Encoding, ...] = (
    _plain("f32", 0, "<f4", "f32 value", _to_float("<f4")),
    _plain("f16", 1, "<f2", "f16 value", _to_float("<f2")),
    Encoding(
        "bf16",
        1,
        2,
        _dequantize_bf16,
        _quantize_bf16,
        "u16 value: the upper half of a float32",
        _SPEC,
        30,
    ),
    _plain("f64", 28, "<f8", "f64 value (dequantize rounds it to float32)", _to_float("<f8")),
    _plain("i8", 24, "<i1", "i8 value", _to_integer("i8", "<i1")),
    _plain("i16", 25, "<i2", "i16 value", _to_integer("i16", "<i2")),
    _plain(
        "i32", 26, "<i4", "i32 value (dequantize rounds it to float32's 24 bits)", _to_integer("i32", "<i4")
    ),
    _plain(
        "i64", 27, "<i8", "i64 value (dequantize rounds it to float32's 24 bits)", _to_integer("i64", "<i8")
    ),
)
"""``dequantize`` gives float32 and rounds what does not fit; ``quantize`` of the integers rounds
to nearest even and saturates."""
