"""The IQ types: groups of 4 or 8 values from a codebook, or 4-bit codes with uneven levels.

Layout: ``ggml-common.h`` and ``ggml-quants.c`` of https://github.com/ggml-org/llama.cpp
(``ggml/src``). The codebooks are in ``iq_grids.py``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import block_encoding, f16, fields, planes, signs_of, u16, u32
from nybble.checkpoint.encodings.iq_grids import IQ4_LEVELS, grid, signs

_SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (block_{name})"
_DELTA = np.float32(0.125)
_LEVELS4 = np.array(IQ4_LEVELS, dtype=np.float32)


def _entries(name: str, index: npt.NDArray[np.generic]) -> Floats:
    """Codebook entries: index (n, k) to float32 (n, k, values)."""
    return grid(name)[index].astype(np.float32)


def _spread(scale: Floats, values: Floats) -> Floats:
    """Each block's scales (n, s) times its 256 values, of any shape, in s equal runs."""
    n, count = scale.shape
    return (scale[..., None] * values.reshape(n, count, 256 // count)).reshape(n, 256)


def _sign_groups(words: npt.NDArray[np.int64]) -> Floats:
    """Four 7-bit sign indices in each 32-bit word: (n, k) to float32 (n, 4 k, 8)."""
    index = (words[..., None] >> np.array([0, 7, 14, 21])) & 127
    return signs()[index.reshape(len(words), -1)]


def _quarter(blocks: Bytes, scales: npt.NDArray[np.generic]) -> Floats:
    """d * (0.5 + scale) / 4, the scale of the iq2 types: float32 (n, k)."""
    return f16(blocks, 0) * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(0.25)


def _decode_iq2_xxs(blocks: Bytes) -> Floats:
    n = len(blocks)
    words = u32(blocks, 2, 66).reshape(n, 8, 2)
    index = blocks[:, 2:66].reshape(n, 8, 8)[..., :4].reshape(n, 32)
    values = _entries("iq2xxs", index) * _sign_groups(words[..., 1])
    return _spread(_quarter(blocks, words[..., 1] >> 28), values)


def _decode_iq2_xs(blocks: Bytes) -> Floats:
    codes = u16(blocks, 2, 66)
    values = _entries("iq2xs", codes & 511) * signs()[codes >> 9]
    return _spread(_quarter(blocks, fields(blocks[:, 66:74], 4)), values)


def _decode_iq2_s(blocks: Bytes) -> Floats:
    index = blocks[:, 2:34].astype(np.int32) | (fields(blocks[:, 66:74], 2).astype(np.int32) << 8)
    values = _entries("iq2s", index).reshape(-1, 256) * signs_of(blocks[:, 34:66])
    return _spread(_quarter(blocks, fields(blocks[:, 74:82], 4)), values)


def _decode_iq3_xxs(blocks: Bytes) -> Floats:
    words = u32(blocks, 66, 98)
    scale = f16(blocks, 0) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    values = _entries("iq3xxs", blocks[:, 2:66]).reshape(-1, 32, 8) * _sign_groups(words)
    return _spread(scale, values)


def _decode_iq3_s(blocks: Bytes) -> Floats:
    index = blocks[:, 2:66].astype(np.int32) | (fields(blocks[:, 66:74], 1).astype(np.int32) << 8)
    scale = f16(blocks, 0) * (1 + 2 * fields(blocks[:, 106:110], 4).astype(np.float32))
    return _spread(scale, _entries("iq3s", index).reshape(-1, 256) * signs_of(blocks[:, 74:106]))


def _decode_iq1_s(blocks: Bytes) -> Floats:
    n = len(blocks)
    high = u16(blocks, 34, 50)
    index = blocks[:, 2:34].astype(np.int32) | (
        ((high[..., None] >> np.array([0, 3, 6, 9])) & 7) << 8
    ).reshape(n, 32)
    scale = f16(blocks, 0) * (2 * ((high >> 12) & 7) + 1).astype(np.float32)
    delta = np.where(high & 0x8000, -_DELTA, _DELTA).astype(np.float32)
    return _spread(scale, _entries("iq1s", index).reshape(n, 8, 32) + delta[..., None])


def _decode_iq1_m(blocks: Bytes) -> Floats:
    n = len(blocks)
    words = u16(blocks, 48, 56)
    # The float16 scale is the top four bits of the four words of scales.
    bits = ((words >> 12) << np.array([0, 4, 8, 12])).sum(axis=1)
    scale = bits.astype(np.uint16).view(np.float16).astype(np.float32).reshape(n, 1)
    small = ((words[..., None] >> np.array([0, 3, 6, 9])) & 7).reshape(n, 16)
    high = fields(blocks[:, 32:48], 4)
    index = blocks[:, :32].astype(np.int32) | ((high & np.uint8(7)).astype(np.int32) << 8)
    delta = np.where(high & np.uint8(8), -_DELTA, _DELTA).astype(np.float32)
    values = _entries("iq1s", index) + delta[..., None]
    return _spread(scale * (2 * small + 1).astype(np.float32), values)


def _decode_iq4_nl(blocks: Bytes) -> Floats:
    return f16(blocks, 0) * _LEVELS4[planes(blocks[:, 2:], 4).reshape(len(blocks), 32)]


def _decode_iq4_xs(blocks: Bytes) -> Floats:
    n = len(blocks)
    high = (u16(blocks, 2, 4) >> np.arange(0, 16, 2)) & 3
    small = fields(blocks[:, 4:8], 4).astype(np.int32) | (high << 4)
    scale = f16(blocks, 0) * (small - 32).astype(np.float32)
    codes = planes(blocks[:, 8:].reshape(n, 8, 16), 4).reshape(n, 256)
    return _spread(scale, _LEVELS4[codes])


ROWS: tuple[Encoding, ...] = (
    block_encoding(
        "iq1_s",
        256,
        50,
        _decode_iq1_s,
        ggml_type=19,
        layout="""\
 0      2            34         50
 | d    | qs         | qh       |   d f16, qs 32 bytes, qh 8 uint16, one a sub-block of 32
 qs[g]: lower 8 bits of the index of group g of 8
 qh: bits 3k to 3k + 2 (k 0-3) upper bits of the index of group k; 12-14 scale; 15 sign of delta = 0.125
 value = d * (2 scale + 1) * (iq1s[index] + delta)""",
        source=_SOURCE.format(name="iq1_s"),
    ),
    block_encoding(
        "iq1_m",
        256,
        56,
        _decode_iq1_m,
        ggml_type=29,
        layout="""\
 0            32       48       56
 | qs         | qh     | scales |   qs 32 bytes, qh 16 bytes, scales 4 uint16
 qs[g]: lower 8 bits of the index of group g of 8
 qh, half a byte a group: bits 0-2 upper bits of the index, 3 sign of delta = 0.125
 scales: bits 3k to 3k + 2 (k 0-3) of word w: scale of the 16 elements from 64 w + 16 k;
         bits 12-15 of the words, word 0's the lowest: d, a float16
 value = d * (2 scale + 1) * (iq1s[index] + delta)""",
        source=_SOURCE.format(name="iq1_m"),
    ),
    block_encoding(
        "iq2_xxs",
        256,
        66,
        _decode_iq2_xxs,
        native=True,
        ggml_type=16,
        layout="""\
 0      2                66
 | d    | qs             |   d f16, qs 8 bytes a sub-block of 32:
 4 bytes of index, one a group of 8; then uint32: bits 7k to 7k + 6 sign pattern of group k, 28-31 scale
 value = d * (0.5 + scale) / 4 * sign * iq2xxs[index]""",
        source=_SOURCE.format(name="iq2_xxs"),
    ),
    block_encoding(
        "iq2_xs",
        256,
        74,
        _decode_iq2_xs,
        native=True,
        ggml_type=17,
        layout="""\
 0      2                66       74
 | d    | qs             | scales |   d f16, qs 32 uint16, one a group of 8: bits 0-8 index, 9-15 sign pattern
 scales: half a byte for every 16 elements, low half first
 value = d * (0.5 + scale) / 4 * sign * iq2xs[index]""",
        source=_SOURCE.format(name="iq2_xs"),
    ),
    block_encoding(
        "iq2_s",
        256,
        82,
        _decode_iq2_s,
        native=True,
        ggml_type=22,
        layout="""\
 0      2          34         66     74       82
 | d    | qs       | signs    | qh   | scales |   d f16
 qs[g]: lower 8 bits of the index of group g of 8; qh: 2 upper bits a group; signs: a bit an element
 scales: half a byte for every 16 elements, low half first
 value = d * (0.5 + scale) / 4 * sign * iq2s[index]""",
        source=_SOURCE.format(name="iq2_s"),
    ),
    block_encoding(
        "iq3_xxs",
        256,
        98,
        _decode_iq3_xxs,
        native=True,
        ggml_type=18,
        layout="""\
 0      2                66           98
 | d    | qs             | scales     |   d f16, qs 64 bytes of index, one a group of 4
 scales: uint32 a sub-block of 32: bits 7k to 7k + 6 sign pattern of its elements 8 k to + 7, 28-31 scale
 value = d * (0.5 + scale) / 2 * sign * iq3xxs[index]""",
        source=_SOURCE.format(name="iq3_xxs"),
    ),
    block_encoding(
        "iq3_s",
        256,
        110,
        _decode_iq3_s,
        native=True,
        ggml_type=21,
        layout="""\
 0      2                66     74           106      110
 | d    | qs             | qh   | signs      | scales |   d f16
 qs[g]: lower 8 bits of the index of group g of 4; qh: bit g its ninth bit; signs: a bit an element
 scales: half a byte for every 32 elements, low half first
 value = d * (2 scale + 1) * sign * iq3s[index]""",
        source=_SOURCE.format(name="iq3_s"),
    ),
    block_encoding(
        "iq4_nl",
        32,
        18,
        _decode_iq4_nl,
        native=True,
        ggml_type=20,
        layout="""\
 0      2                18
 | d    | qs             |   d f16 scale, qs as in q4_0
 value = d * level[code]""",
        source=_SOURCE.format(name="iq4_nl"),
    ),
    block_encoding(
        "iq4_xs",
        256,
        136,
        _decode_iq4_xs,
        native=True,
        ggml_type=23,
        layout="""\
 0      2      4      8                136
 | d    | sh   | sl   | qs             |   d f16, sh uint16, sl 4 bytes
 sl: lower 4 bits of the scales of 8 sub-blocks of 32, low half first; sh: upper 2 bits of each
 qs: 16 bytes a sub-block: its element i in the low, 16 + i in the high half of byte i
 value = d * (scale - 32) * level[code]""",
        source=_SOURCE.format(name="iq4_xs"),
    ),
)
