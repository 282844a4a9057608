"""The simple GGUF types: blocks of 32 to 128 with one scale, and a minimum in the ``_1`` types.

Layout and rounding: ``ggml-common.h`` and ``ggml-quants.c`` of
https://github.com/ggml-org/llama.cpp (``ggml/src``).
"""

from __future__ import annotations

import numpy as np

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import block_encoding, f16, fields, inverse, planes, signs_of, to_f16

_SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (block_{name})"


def _codes(blocks: Bytes, start: int) -> Bytes:
    """The 32 nibbles at ``start``: low halves of the 16 bytes first. uint8 (n, 32)."""
    return planes(blocks[:, start : start + 16], 4).reshape(len(blocks), 32)


def _codes5(blocks: Bytes, start: int) -> Bytes:
    """32 five-bit codes: fifth bits in the 4 bytes at ``start``, nibbles after them."""
    return _codes(blocks, start + 4) | (fields(blocks[:, start : start + 4], 1) << np.uint8(4))


def _pack(codes: Bytes) -> Bytes:
    """The reverse of ``_codes`` for the lower four bits: uint8 (n, 16)."""
    return (codes[:, :16] & np.uint8(15)) | (codes[:, 16:] << np.uint8(4))


def _fifth(codes: Bytes) -> Bytes:
    return np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")


def _symmetric(name: str, values: Floats, half: int) -> tuple[Bytes, Bytes]:
    """Scale that maps the value of largest magnitude to code 0, and the codes 0 to 2 half - 1."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-half)
    codes = np.trunc(values * inverse(scale) + np.float32(half + 0.5))
    return to_f16(name, scale), np.clip(codes, 0, 2 * half - 1).astype(np.uint8)


def _with_minimum(name: str, values: Floats, highest: int) -> tuple[Bytes, Bytes]:
    """Scale and minimum (4 bytes) that span the block, and the codes 0 to ``highest``."""
    low = values.min(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        scale = (values.max(axis=1, keepdims=True) - low) / np.float32(highest)
        header = np.concatenate([to_f16(name, scale), to_f16(name, low)], axis=1)
        codes = np.trunc((values - low) * inverse(scale) + np.float32(0.5))
    return header, np.clip(codes, 0, highest).astype(np.uint8)


def _decode_q4_0(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * (_codes(blocks, 2).astype(np.float32) - np.float32(8))


def _encode_q4_0(values: Floats) -> Bytes:
    scale, codes = _symmetric("q4_0", values, 8)
    return np.concatenate([scale, _pack(codes)], axis=1)


def _decode_q4_1(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * _codes(blocks, 4).astype(np.float32) + f16(blocks, 2)


def _encode_q4_1(values: Floats) -> Bytes:
    header, codes = _with_minimum("q4_1", values, 15)
    return np.concatenate([header, _pack(codes)], axis=1)


def _decode_q5_0(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * (_codes5(blocks, 2).astype(np.float32) - np.float32(16))


def _encode_q5_0(values: Floats) -> Bytes:
    scale, codes = _symmetric("q5_0", values, 16)
    return np.concatenate([scale, _fifth(codes), _pack(codes)], axis=1)


def _decode_q5_1(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * _codes5(blocks, 4).astype(np.float32) + f16(blocks, 2)


def _encode_q5_1(values: Floats) -> Bytes:
    header, codes = _with_minimum("q5_1", values, 31)
    return np.concatenate([header, _fifth(codes), _pack(codes)], axis=1)


def _decode_q8_0(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _encode_q8_0(values: Floats) -> Bytes:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    # Halves away from zero, as C's roundf; adding 0.5 first would lose a bit.
    rounded = np.copysign(whole + np.floor(np.float32(2) * (magnitude - whole)), scaled)
    codes = np.clip(rounded, -127, 127).astype(np.int8).view(np.uint8)
    return np.concatenate([to_f16("q8_0", scale), codes], axis=1)


def _decode_q8_1(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * blocks[:, 4:].view(np.int8).astype(np.float32)


ROWS: tuple[Encoding, ...] = (
    block_encoding(
        "q4_0",
        32,
        18,
        _decode_q4_0,
        _encode_q4_0,
        ggml_type=2,
        layout="""\
 0      2                18
 | d    | qs             |   d  f16 scale
                             qs 16 bytes: element i in the low, 16 + i in the high half of byte i
 value = d * (code - 8)""",
        source=_SOURCE.format(name="q4_0"),
    ),
    block_encoding(
        "q4_1",
        32,
        20,
        _decode_q4_1,
        _encode_q4_1,
        ggml_type=3,
        layout="""\
 0      2      4                20
 | d    | m    | qs             |   d f16 scale, m f16 minimum, qs as in q4_0
 value = d * code + m""",
        source=_SOURCE.format(name="q4_1"),
    ),
    block_encoding(
        "q5_0",
        32,
        22,
        _decode_q5_0,
        _encode_q5_0,
        ggml_type=6,
        layout="""\
 0      2          6                22
 | d    | qh       | qs             |   d f16 scale, qs as in q4_0
                                        qh 32 bits: bit i is the fifth bit of element i
 value = d * (code - 16)""",
        source=_SOURCE.format(name="q5_0"),
    ),
    block_encoding(
        "q5_1",
        32,
        24,
        _decode_q5_1,
        _encode_q5_1,
        ggml_type=7,
        layout="""\
 0      2      4          8                24
 | d    | m    | qh       | qs             |   d f16 scale, m f16 minimum, qh and qs as in q5_0
 value = d * code + m""",
        source=_SOURCE.format(name="q5_1"),
    ),
    block_encoding(
        "q8_0",
        32,
        34,
        _decode_q8_0,
        _encode_q8_0,
        ggml_type=8,
        layout="""\
 0      2                     34
 | d    | qs                  |   d f16 scale, qs 32 int8
 value = d * code""",
        source=_SOURCE.format(name="q8_0"),
    ),
    block_encoding(
        "q8_1",
        32,
        36,
        _decode_q8_1,
        ggml_type=9,
        layout="""\
 0      2      4                     36
 | d    | s    | qs                  |   d f16 scale, s f16 d * sum of the codes, qs 32 int8
 value = d * code (s only speeds dot products up; intermediate type, not found in model files)""",
        source=_SOURCE.format(name="q8_1"),
    ),
    block_encoding(
        "q1_0",
        128,
        18,
        lambda blocks: f16(blocks, 0) * -signs_of(blocks[:, 2:]),
        native=True,
        ggml_type=41,
        layout="""\
 0      2                18
 | d    | qs             |   d f16 scale, qs 128 bits: element i is bit i % 8 of byte i / 8
 value = d where the bit is 1, -d where it is 0""",
        source=_SOURCE.format(name="q1_0"),
    ),
    block_encoding(
        "q2_0",
        64,
        18,
        lambda blocks: f16(blocks, 0) * (fields(blocks[:, 2:], 2).astype(np.float32) - np.float32(1)),
        native=True,
        ggml_type=42,
        layout="""\
 0      2                18
 | d    | qs             |   d f16 scale, qs 64 codes of 2 bits: element i in bits 2 (i % 4) of byte i / 4
 value = d * (code - 1)""",
        source="https://github.com/ggml-org/llama.cpp/pull/24448 (block_q2_0)",
    ),
)
