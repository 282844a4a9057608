"""Types with 4-bit floats (e2m1) and 8-bit scales: OCP microscaling MXFP4 and NVIDIA's NVFP4.

Specification of e2m1 and e8m0:
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

import numpy as np

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import block_encoding, planes
from nybble.checkpoint.encodings.iq_grids import E2M1_LEVELS

_LEVELS = np.array(E2M1_LEVELS, dtype=np.float32)


def half_e8m0(exponents: Bytes) -> Floats:
    """2 ** (exponent - 128): half of an e8m0 scale, because the levels are doubled."""
    wide = exponents.astype(np.uint32)
    # The two smallest are subnormal in float32.
    bits = np.where(wide < 2, np.uint32(0x00200000) << wide, (wide - np.uint32(1)) << np.uint32(23))
    return bits.astype(np.uint32).view(np.float32)


def half_ue4m3(scales: Bytes) -> Floats:
    """Half of an unsigned e4m3 scale (bias 7); 0x7f, its not-a-number, gives 0 as in llama.cpp."""
    exponent = ((scales >> np.uint8(3)) & np.uint8(15)).astype(np.int32)
    mantissa = (scales & np.uint8(7)).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 8)
    value = np.where(exponent == 0, np.ldexp(mantissa, -10), normal)
    return np.where(scales == 0x7F, np.float32(0), value).astype(np.float32)


def _decode_mxfp4(blocks: Bytes) -> Floats:
    codes = planes(blocks[:, 1:], 4).reshape(len(blocks), 32)
    return half_e8m0(blocks[:, :1]) * _LEVELS[codes]


def _decode_nvfp4(blocks: Bytes) -> Floats:
    codes = planes(blocks[:, 4:].reshape(len(blocks), 4, 8), 4).reshape(len(blocks), 4, 16)
    return (half_ue4m3(blocks[:, :4])[..., None] * _LEVELS[codes]).reshape(len(blocks), 64)


ROWS: tuple[Encoding, ...] = (
    block_encoding(
        "mxfp4",
        32,
        17,
        _decode_mxfp4,
        native=True,
        ggml_type=39,
        layout="""\
 0   1                17
 | e | qs             |   e e8m0 scale: 2 ** (e - 127)
                          qs 16 bytes: element i in the low, 16 + i in the high half of byte i, each e2m1
 value = scale * e2m1""",
        source="https://github.com/ggml-org/llama.cpp/pull/15091 (block_mxfp4)",
    ),
    block_encoding(
        "nvfp4",
        64,
        36,
        _decode_nvfp4,
        native=True,
        ggml_type=40,
        layout="""\
 0          4                    36
 | d        | qs                 |   d 4 bytes: unsigned e4m3 scales of the sub-blocks of 16
 qs: 8 bytes a sub-block: its element i in the low, 8 + i in the high half of byte i, each e2m1
 value = scale * e2m1 (a factor of the whole tensor, if there is one, is a tensor of its own)""",
        source="https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (block_nvfp4)",
    ),
)
