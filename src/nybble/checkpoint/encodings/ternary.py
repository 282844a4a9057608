"""The ternary types of BitNet-like models: 256 values of -1, 0, 1 and one scale.

Layout: ``ggml-common.h`` of https://github.com/ggml-org/llama.cpp (``ggml/src``); described in
https://github.com/ggml-org/llama.cpp/pull/8151.
"""

from __future__ import annotations

import numpy as np

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import block_encoding, f16, planes

_SOURCE = "https://github.com/ggml-org/llama.cpp/pull/8151 (block_{name})"


def _trits(data: Bytes, count: int) -> Bytes:
    """The ``count`` base-3 digits in each byte, plane by plane: (n, k) to (n, count * k).

    A byte is ceil(256 * number / 243): a fixed-point fraction, whose digits come out on top when
    it is multiplied by 3 again and again.
    """
    powers = (3 ** np.arange(count)).astype(np.uint8).reshape(1, -1, 1)
    fraction = (data[:, None, :] * powers).astype(np.uint16)  # wraps at 256: the digits above drop off
    return ((fraction * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(len(data), -1)


def _decode_tq1_0(blocks: Bytes) -> Floats:
    digits = [_trits(blocks[:, 0:32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)]
    return f16(blocks, 52) * (np.concatenate(digits, axis=1).astype(np.float32) - np.float32(1))


def _decode_tq2_0(blocks: Bytes) -> Floats:
    codes = planes(blocks[:, :64].reshape(len(blocks), 2, 32), 2).reshape(len(blocks), 256)
    return f16(blocks, 64) * (codes.astype(np.float32) - np.float32(1))


ROWS: tuple[Encoding, ...] = (
    block_encoding(
        "tq1_0",
        256,
        54,
        _decode_tq1_0,
        native=True,
        ggml_type=34,
        layout="""\
 0                 48     52     54
 | qs              | qh   | d    |   d f16
 qs: 32 bytes of 5 digits: digit p of byte j is element 32 p + j; then 16 bytes: element 160 + 16 p + j
 qh: 4 bytes of 4 digits: digit p of byte j is element 240 + 4 p + j
 a byte is ceil(256 * number / 243), digits base 3, the first the highest
 value = d * (digit - 1)""",
        source=_SOURCE.format(name="tq1_0"),
    ),
    block_encoding(
        "tq2_0",
        256,
        66,
        _decode_tq2_0,
        native=True,
        ggml_type=35,
        layout="""\
 0                 64     66
 | qs              | d    |   d f16
 qs: two runs of 32 bytes; bits 2p of run r hold elements 128 r + 32 p to + 31
 value = d * (code - 1)""",
        source=_SOURCE.format(name="tq2_0"),
    ),
)
