"""GGUF's integer block types taken apart into Groups and put together again.

Layouts are drawn in ``checkpoint/encodings/legacy.py`` and ``k_quants.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.base import Bytes
from nybble.checkpoint.encodings.blocks import fields, planes
from nybble.convert.transcode.common_factor import common_factor
from nybble.convert.transcode.groups import Groups
from nybble.convert.transcode.scales import narrowed

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]


@dataclass(frozen=True)
class BlockType:
    """How one type is taken apart and put together."""

    group_size: int
    groups: int
    """In a block."""
    middle: int | None
    """Zero point of all groups; None: each has a minimum."""
    highest: int
    """Largest code."""
    take: Callable[[Bytes], Groups]
    """uint8 (blocks, block_bytes) to Groups; DoesNotFit."""
    make: Callable[[Groups], Bytes]
    """The reverse, for groups whose codes fit: uint8 (blocks, block_bytes); DoesNotFit."""


# -- fields ------------------------------------------------------------------------------------------


def _half(blocks: Bytes, start: int) -> Floats:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")[:, 0].astype(np.float32)


def _half_bytes(values: npt.NDArray[np.float16]) -> Bytes:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(data: Bytes) -> Codes:
    """16 bytes a row as 32 codes, low halves first."""
    return planes(data, 4).reshape(len(data), 32).astype(np.int16)


def _pack_nibbles(codes: Codes) -> Bytes:
    low = codes.astype(np.uint8) & np.uint8(15)
    packed: Bytes = low[:, :16] | (low[:, 16:] << np.uint8(4))
    return packed


def _fifth(data: Bytes) -> Codes:
    """4 bytes a row as the fifth bits of 32 codes."""
    bits: Codes = fields(data, 1).astype(np.int16) << np.int16(4)
    return bits


def _pack_fifth(codes: Codes) -> Bytes:
    return np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little")


def _runs(data: Bytes, run: int, width: int) -> Bytes:
    """Codes whose runs of bytes hold plane after plane, as the K types have them."""
    return planes(data.reshape(len(data), -1, run), width).reshape(len(data), -1)


def _pack_runs(codes: Bytes, run: int, width: int) -> Bytes:
    """The reverse of ``_runs``."""
    count = 8 // width
    parts = codes.reshape(len(codes), -1, count, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), -1)
    return packed


# -- scale and middle --------------------------------------------------------------------------------


def _constant(codes: Codes, scales: Floats, middle: int) -> Groups:
    return Groups(codes, scales, np.full(len(scales), middle, np.int16))


def _take_q4_0(blocks: Bytes) -> Groups:
    return _constant(_nibbles(blocks[:, 2:]), _half(blocks, 0), 8)


def _make_q4_0(groups: Groups) -> Bytes:
    return np.concatenate([_half_bytes(narrowed(groups.scales)), _pack_nibbles(groups.codes)], axis=1)


def _take_q5_0(blocks: Bytes) -> Groups:
    return _constant(_nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6]), _half(blocks, 0), 16)


def _make_q5_0(groups: Groups) -> Bytes:
    scale = _half_bytes(narrowed(groups.scales))
    return np.concatenate([scale, _pack_fifth(groups.codes), _pack_nibbles(groups.codes)], axis=1)


def _take_q8_0(blocks: Bytes) -> Groups:
    codes = (blocks[:, 2:] ^ np.uint8(0x80)).astype(np.int16)
    return _constant(codes, _half(blocks, 0), 128)


def _make_q8_0(groups: Groups) -> Bytes:
    codes = groups.codes.astype(np.uint8) ^ np.uint8(0x80)
    return np.concatenate([_half_bytes(narrowed(groups.scales)), codes], axis=1)


def _take_q6_k(blocks: Bytes) -> Groups:
    low, high = _runs(blocks[:, :128], 64, 4), _runs(blocks[:, 128:192], 32, 2)
    codes = (low | (high << np.uint8(4))).astype(np.int16).reshape(-1, 16)
    sub = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _constant(codes, (_half(blocks, 208)[:, None] * sub).reshape(-1), 32)


def _make_q6_k(groups: Groups) -> Bytes:
    factor, sub = common_factor(groups.scales.astype(np.float64).reshape(-1, 16), -128, 127, "scales")
    codes = groups.codes.astype(np.uint8).reshape(-1, 256)
    return np.concatenate(
        [
            _pack_runs(codes & np.uint8(15), 64, 4),
            _pack_runs(codes >> np.uint8(4), 32, 2),
            sub.astype(np.int8).view(np.uint8),
            _half_bytes(factor),
        ],
        axis=1,
    )


# -- scale and minimum -------------------------------------------------------------------------------


def _with_minima(codes: Codes, scales: Floats, minima: Floats) -> Groups:
    return Groups(codes, scales, np.zeros(len(scales), np.int16), minima)


def _minima(groups: Groups) -> Floats:
    """Those that the groups must have by now."""
    assert groups.minima is not None
    return groups.minima


def _take_q4_1(blocks: Bytes) -> Groups:
    return _with_minima(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _take_q5_1(blocks: Bytes) -> Groups:
    codes = _nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8])
    return _with_minima(codes, _half(blocks, 0), _half(blocks, 2))


def _header_1(groups: Groups) -> Bytes:
    """Scale and minimum of q4_1 and q5_1."""
    minima = narrowed(_minima(groups), "minimum")
    return np.concatenate([_half_bytes(narrowed(groups.scales)), _half_bytes(minima)], axis=1)


def _make_q4_1(groups: Groups) -> Bytes:
    return np.concatenate([_header_1(groups), _pack_nibbles(groups.codes)], axis=1)


def _make_q5_1(groups: Groups) -> Bytes:
    header = _header_1(groups)
    return np.concatenate([header, _pack_fifth(groups.codes), _pack_nibbles(groups.codes)], axis=1)


_SIX, _TWO, _FOUR = np.uint8(0x3F), np.uint8(0x30), np.uint8(4)


def _take_k(blocks: Bytes, codes: Bytes) -> Groups:
    """q4_k and q5_k: 8 six-bit scales and 8 six-bit minima in bytes 4 to 16.

    Minima are subtracted there; that is to add the same numbers with the other sign.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = [first & _SIX, (third & np.uint8(15)) | ((first >> np.uint8(2)) & _TWO)]
    minima = [second & _SIX, (third >> _FOUR) | ((second >> np.uint8(2)) & _TWO)]
    step = _half(blocks, 0)[:, None] * np.concatenate(scales, axis=1).astype(np.float32)
    low = _half(blocks, 2)[:, None] * np.concatenate(minima, axis=1).astype(np.float32)
    return _with_minima(codes.astype(np.int16).reshape(-1, 32), step.reshape(-1), -low.reshape(-1))


def _subtracted(groups: Groups) -> npt.NDArray[np.float64]:
    """Minima with the other sign: (blocks, 8). Zeros get the sign that the others have in their block: beside
    a positive scale it is not seen."""
    low = -_minima(groups).astype(np.float64).reshape(-1, 8)
    top = np.take_along_axis(low, np.abs(low).argmax(axis=1)[:, None], axis=1)
    free = (low == 0) & ~np.signbit(groups.scales).reshape(-1, 8)
    return np.where(free, np.where(top < 0, -0.0, 0.0), low)


def _header_k(groups: Groups) -> Bytes:
    """The first 16 bytes of q4_k and q5_k."""
    step, scales = common_factor(groups.scales.astype(np.float64).reshape(-1, 8), 0, 63, "scales")
    low, minima = common_factor(_subtracted(groups), 0, 63, "minima")
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    first = (s[:, :4] & _SIX) | ((s[:, 4:] & _TWO) << np.uint8(2))
    second = (m[:, :4] & _SIX) | ((m[:, 4:] & _TWO) << np.uint8(2))
    third = (s[:, 4:] & np.uint8(15)) | ((m[:, 4:] & np.uint8(15)) << _FOUR)
    return np.concatenate([_half_bytes(step), _half_bytes(low), first, second, third], axis=1)


def _take_q4_k(blocks: Bytes) -> Groups:
    return _take_k(blocks, _runs(blocks[:, 16:], 32, 4))


def _make_q4_k(groups: Groups) -> Bytes:
    codes = groups.codes.astype(np.uint8).reshape(-1, 256)
    return np.concatenate([_header_k(groups), _pack_runs(codes, 32, 4)], axis=1)


def _take_q5_k(blocks: Bytes) -> Groups:
    fifth = _runs(blocks[:, 16:48], 32, 1)
    return _take_k(blocks, _runs(blocks[:, 48:], 32, 4) | (fifth << _FOUR))


def _make_q5_k(groups: Groups) -> Bytes:
    codes = groups.codes.astype(np.uint8).reshape(-1, 256)
    header, fifth = _header_k(groups), _pack_runs(codes >> _FOUR, 32, 1)
    return np.concatenate([header, fifth, _pack_runs(codes & np.uint8(15), 32, 4)], axis=1)


BLOCK_TYPES: Mapping[str, BlockType] = {
    "q4_0": BlockType(32, 1, 8, 15, _take_q4_0, _make_q4_0),
    "q4_1": BlockType(32, 1, None, 15, _take_q4_1, _make_q4_1),
    "q5_0": BlockType(32, 1, 16, 31, _take_q5_0, _make_q5_0),
    "q5_1": BlockType(32, 1, None, 31, _take_q5_1, _make_q5_1),
    "q8_0": BlockType(32, 1, 128, 255, _take_q8_0, _make_q8_0),
    "q4_k": BlockType(32, 8, None, 15, _take_q4_k, _make_q4_k),
    "q5_k": BlockType(32, 8, None, 31, _take_q5_k, _make_q5_k),
    "q6_k": BlockType(16, 16, 32, 63, _take_q6_k, _make_q6_k),
}
