"""Rebuilding GGUF's blocks from their values: what float32 has no place for is kept beside it.

A block's values do not say which scales they were made with. Where quantizing the values anew gives
the same blocks, nothing need be kept. Otherwise the blocks' headers (scales and minima, half a bit a
weight for K types) are: with them the codes follow from the values. Blocks that even this does not
bring back (a scale of 0 hides its codes) are kept whole.

``kept`` makes that record of one piece of a tensor, and ``rebuilt`` is the way back; ``carried.py`` has
them in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import Encoding
from nybble.checkpoint.encodings.base import Bytes, Floats

Codes = npt.NDArray[np.uint8]


def _planes(codes: Codes, run: int, width: int) -> Bytes:
    """Codes (n, 256) as planes of ``width`` bits over runs of bytes: the K types' order."""
    planes = 8 // width
    parts = codes.reshape(len(codes), -1, planes, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), -1)
    return packed


def _nibbles(codes: Codes) -> Bytes:
    packed: Bytes = (codes[:, :16] & np.uint8(15)) | (codes[:, 16:] << np.uint8(4))
    return packed


def _fifth(codes: Codes) -> Bytes:
    return np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")


def _low(codes: Codes, bits: int) -> Codes:
    low: Codes = codes & np.uint8((1 << bits) - 1)
    return low


def _high(codes: Codes, bits: int) -> Codes:
    high: Codes = codes >> np.uint8(bits)
    return high


@dataclass(frozen=True)
class _Layout:
    """Where a block has its header, and how codes become the rest of its bytes."""

    header: tuple[tuple[int, int], ...]
    """Byte ranges."""
    levels: int
    """Codes are 0 to ``levels`` - 1; those of int8 are moved up by 128."""
    pack: Callable[[Codes], tuple[tuple[int, Bytes], ...]]
    """Codes (n, block_size) to the first byte and the bytes (n, count) of each field."""


_LAYOUTS: Mapping[str, _Layout] = {
    "q4_0": _Layout(((0, 2),), 16, lambda c: ((2, _nibbles(c)),)),
    "q4_1": _Layout(((0, 4),), 16, lambda c: ((4, _nibbles(c)),)),
    "q5_0": _Layout(((0, 2),), 32, lambda c: ((2, _fifth(c)), (6, _nibbles(_low(c, 4))))),
    "q5_1": _Layout(((0, 4),), 32, lambda c: ((4, _fifth(c)), (8, _nibbles(_low(c, 4))))),
    "q8_0": _Layout(((0, 2),), 256, lambda c: ((2, c ^ np.uint8(128)),)),
    "q2_k": _Layout(((0, 16), (80, 84)), 4, lambda c: ((16, _planes(c, 32, 2)),)),
    "q3_k": _Layout(
        ((96, 110),), 8, lambda c: ((0, _planes(_high(c, 2), 32, 1)), (32, _planes(_low(c, 2), 32, 2)))
    ),
    "q4_k": _Layout(((0, 16),), 16, lambda c: ((16, _planes(c, 32, 4)),)),
    "q5_k": _Layout(
        ((0, 16),), 32, lambda c: ((16, _planes(_high(c, 4), 32, 1)), (48, _planes(_low(c, 4), 32, 4)))
    ),
    "q6_k": _Layout(
        ((192, 210),), 64, lambda c: ((0, _planes(_low(c, 4), 64, 4)), (128, _planes(_high(c, 4), 32, 2)))
    ),
}

_DEFINED = frozenset({"q4_0", "q4_1", "q5_0", "q5_1", "q8_0"})
"""Encodings whose quantizer is defined for good: what it gives today it gives with any later version."""

REBUILDABLE = frozenset(_LAYOUTS)
"""Encodings that ``keep`` can make a record of."""


@dataclass(frozen=True)
class Record:
    """What is kept of some blocks beside their values."""

    count: int
    """How many blocks."""
    headers: Bytes | None
    """(count, header bytes); None where the blocks are what quantizing the values gives."""
    places: npt.NDArray[np.int64]
    """Which blocks are kept whole."""
    whole: Bytes
    """Those blocks: (places, block_bytes)."""

    @property
    def nbytes(self) -> int:
        """Size of all of it."""
        return (0 if self.headers is None else self.headers.size) + 4 * self.places.size + self.whole.size


def header_bytes(encoding: Encoding) -> int:
    """Bytes of a block's header."""
    return sum(stop - start for start, stop in _LAYOUTS[encoding.name].header)


def headers_of(encoding: Encoding, data: Bytes) -> Bytes:
    """The headers of whole blocks: uint8 (blocks, header_bytes)."""
    blocks = data.reshape(-1, encoding.block_bytes)
    ranges = _LAYOUTS[encoding.name].header
    return np.concatenate([blocks[:, start:stop] for start, stop in ranges], axis=1)


def with_headers(encoding: Encoding, values: Floats, headers: Bytes) -> Bytes:
    """Blocks (n, block_bytes) with these headers whose values are as near as they can be.

    The step between two codes is found by decoding blocks of code 0 and of code 1.
    """
    layout = _LAYOUTS[encoding.name]
    wanted = values.reshape(len(headers), encoding.block_size)
    with np.errstate(all="ignore"):
        zero = encoding.dequantize(_blocks(encoding, headers, np.zeros(wanted.shape, np.uint8)).reshape(-1))
        one = encoding.dequantize(_blocks(encoding, headers, np.ones(wanted.shape, np.uint8)).reshape(-1))
        first = zero.reshape(wanted.shape).astype(np.float64)
        step = one.reshape(wanted.shape).astype(np.float64) - first
        codes = np.rint((wanted - first) / step)
    codes = np.where(np.isfinite(codes), codes, 128 if encoding.name == "q8_0" else 0)
    return _blocks(encoding, headers, np.clip(codes, 0, layout.levels - 1).astype(np.uint8))


def _blocks(encoding: Encoding, headers: Bytes, codes: Codes) -> Bytes:
    layout = _LAYOUTS[encoding.name]
    out = np.empty((len(headers), encoding.block_bytes), np.uint8)
    position = 0
    for start, stop in layout.header:
        out[:, start:stop] = headers[:, position : position + stop - start]
        position += stop - start
    for start, field in layout.pack(codes):
        out[:, start : start + field.shape[1]] = field
    return out


def kept(encoding: Encoding, values: Floats, data: Bytes) -> Record:
    """The smallest record with which ``rebuilt`` gives ``data`` back; values and data: flat."""
    blocks = data.reshape(-1, encoding.block_bytes)
    records = []
    if encoding.quantize is not None and encoding.name in _DEFINED:
        with suppress(ValueError):  # values that are not finite
            records.append(_record(blocks, encoding.quantize(values), None))
    if not records or records[0].places.size:
        headers = headers_of(encoding, data)
        records.append(_record(blocks, with_headers(encoding, values, headers), headers))
    return min(records, key=lambda record: record.nbytes)


def rebuilt(encoding: Encoding, values: Floats, record: Record) -> Bytes:
    """The blocks of these values (flat uint8), as they were when the record was made.

    Values that have changed since give other blocks: compare what they decode to.
    """
    if record.headers is None:
        assert encoding.quantize is not None
        blocks = encoding.quantize(values).reshape(-1, encoding.block_bytes)
    else:
        blocks = with_headers(encoding, values, record.headers)
    blocks[record.places] = record.whole
    return blocks.reshape(-1)


def _record(blocks: Bytes, made: Bytes, headers: Bytes | None) -> Record:
    places = np.flatnonzero((made.reshape(blocks.shape) != blocks).any(axis=1))
    return Record(len(blocks), headers, places, blocks[places])
