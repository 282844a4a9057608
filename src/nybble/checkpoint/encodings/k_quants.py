"""The K types: super-blocks of 256 whose sub-blocks of 16 or 32 have small integer scales.

Layout: ``ggml-common.h`` and ``ggml-quants.c`` of https://github.com/ggml-org/llama.cpp
(``ggml/src``); first described in https://github.com/ggml-org/llama.cpp/pull/1684.
"""

from __future__ import annotations

import numpy as np

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import block_encoding, f16, planes, words

_SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (block_{name})"


def _planes(data: Bytes, run: int, width: int) -> Bytes:
    """Codes of ``width`` bits where each run of bytes holds plane after plane.

    uint8 (n, bytes) to (n, bytes * 8 / width): run 0's lowest bits, run 0's next bits, ..., run 1.
    """
    return planes(data.reshape(len(data), -1, run), width).reshape(len(data), -1)


def _decode_q2_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    scales = blocks[:, :16]
    step = f16(blocks, 80) * (scales & np.uint8(15)).astype(np.float32)
    low = f16(blocks, 82) * (scales >> np.uint8(4)).astype(np.float32)
    codes = _planes(blocks[:, 16:80], 32, 2).reshape(n, 16, 16).astype(np.float32)
    return (step[..., None] * codes - low[..., None]).reshape(n, 256)


def _decode_q3_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    low = planes(blocks[:, 96:104], 4).reshape(n, 16)
    high = planes(blocks[:, 104:108], 2).reshape(n, 16)
    scales = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    codes = _planes(blocks[:, 32:96], 32, 2).astype(np.float32)
    top = _planes(blocks[:, :32], 32, 1).astype(np.float32)
    codes += np.float32(4) * top - np.float32(4)
    return ((f16(blocks, 108) * scales)[..., None] * codes.reshape(n, 16, 16)).reshape(n, 256)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """The 8 six-bit scales and 8 six-bit minima in 12 bytes: two float32 (n, 8)."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    six, two = np.uint8(0x3F), np.uint8(0x30)
    scales = [first & six, (third & np.uint8(15)) | ((first >> np.uint8(2)) & two)]
    minima = [second & six, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & two)]
    return np.concatenate(scales, axis=1).astype(np.float32), np.concatenate(minima, axis=1).astype(
        np.float32
    )


def _affine(blocks: Bytes, codes: Bytes) -> Floats:
    """Values of q4_k and q5_k from the header of 16 bytes and uint8 codes (n, 256)."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    step = (f16(blocks, 0) * scales)[..., None]
    low = (f16(blocks, 2) * minima)[..., None]
    return (step * codes.reshape(-1, 8, 32).astype(np.float32) - low).reshape(-1, 256)


def _decode_q4_k(blocks: Bytes) -> Floats:
    return _affine(blocks, _planes(blocks[:, 16:], 32, 4))


def _decode_q5_k(blocks: Bytes) -> Floats:
    fifth = _planes(blocks[:, 16:48], 32, 1)
    return _affine(blocks, _planes(blocks[:, 48:], 32, 4) | (fifth << np.uint8(4)))


def _decode_q6_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    codes = _planes(blocks[:, :128], 64, 4) | (_planes(blocks[:, 128:192], 32, 2) << np.uint8(4))
    centred = codes.reshape(n, 16, 16).astype(np.float32) - np.float32(32)
    scales = words(blocks, 192, 208, "<i1").astype(np.float32)
    return ((f16(blocks, 208) * scales)[..., None] * centred).reshape(n, 256)


def _decode_q8_k(blocks: Bytes) -> Floats:
    scale = words(blocks, 0, 4, "<f4").astype(np.float32)
    return scale * words(blocks, 4, 260, "<i1").astype(np.float32)


ROWS: tuple[Encoding, ...] = (
    block_encoding(
        "q2_k",
        256,
        84,
        _decode_q2_k,
        native=True,
        ggml_type=10,
        layout="""\
 0        16               80     82     84
 | scales | qs             | d    | dmin |   scales 16 bytes, one a sub-block of 16: scale in the low
                                             half, minimum in the high; d, dmin f16
 qs: two runs of 32 bytes; bits 2p of run r hold elements 128 r + 32 p to + 31
 value = d * scale * code - dmin * minimum""",
        source=_SOURCE.format(name="q2_K"),
    ),
    block_encoding(
        "q3_k",
        256,
        110,
        _decode_q3_k,
        native=True,
        ggml_type=11,
        layout="""\
 0       32         96       108    110
 | hmask | qs       | scales | d    |   d f16; qs as in q2_k: the two lower bits
 hmask: bit p of byte j is the third bit of element 32 p + j
 scales: 16 six-bit numbers. Low halves of bytes 0-7 hold the lower 4 bits of 0-7, high halves of 8-15;
         bits 2p of bytes 8-11 hold the upper 2 bits of 4 p to 4 p + 3
 value = d * (scale - 32) * (code - 4)""",
        source=_SOURCE.format(name="q3_K"),
    ),
    block_encoding(
        "q4_k",
        256,
        144,
        _decode_q4_k,
        native=True,
        ggml_type=12,
        layout="""\
 0      2      4        16               144
 | d    | dmin | scales | qs             |   d, dmin f16
 scales: 8 scales s and 8 minima m of six bits, one pair a sub-block of 32:
         byte j     (0-3): s[j] in bits 0-5, upper 2 bits of s[j + 4] in 6-7
         byte 4 + j      : m[j] in bits 0-5, upper 2 bits of m[j + 4] in 6-7
         byte 8 + j      : lower 4 bits of s[j + 4] in bits 0-3, of m[j + 4] in 4-7
 qs: four runs of 32 bytes; low halves of run r are elements 64 r to + 31, high halves 64 r + 32 to + 63
 value = d * s * code - dmin * m""",
        source=_SOURCE.format(name="q4_K"),
    ),
    block_encoding(
        "q5_k",
        256,
        176,
        _decode_q5_k,
        native=True,
        ggml_type=13,
        layout="""\
 0      2      4        16       48               176
 | d    | dmin | scales | qh     | qs             |   d, dmin f16; scales and qs as in q4_k
 qh: bit p of byte j is the fifth bit of element 32 p + j
 value = d * s * code - dmin * m""",
        source=_SOURCE.format(name="q5_K"),
    ),
    block_encoding(
        "q6_k",
        256,
        210,
        _decode_q6_k,
        native=True,
        ggml_type=14,
        layout="""\
 0              128        192      208    210
 | ql           | qh       | scales | d    |   scales 16 int8, one a sub-block of 16; d f16
 ql: two runs of 64 bytes; low halves of run r are elements 128 r to + 63, high halves 128 r + 64 to + 127
 qh: two runs of 32 bytes; bits 2p of run r are the upper 2 bits of elements 128 r + 32 p to + 31
 value = d * scale * (code - 32)""",
        source=_SOURCE.format(name="q6_K"),
    ),
    block_encoding(
        "q8_k",
        256,
        292,
        _decode_q8_k,
        ggml_type=15,
        layout="""\
 0      4                260        292
 | d    | qs             | bsums    |   d f32, qs 256 int8, bsums 16 int16: sums of 16 codes each
 value = d * code (bsums only speed dot products up; intermediate type, not found in model files)""",
        source=_SOURCE.format(name="q8_K"),
    ),
)
