"""Affine integers: codes and, for each group of a row, a scale and perhaps a zero point or a minimum.

This is what AWQ, GPTQ, compressed-tensors and ONNX's ``MatMulNBits`` and ``DequantizeLinear`` mean,
each with its own packing. Readers bring them all into one form whose groups lie one after another
as GGUF's blocks do, so that rows can be cut, joined and permuted; writers pack it again. Nothing is
rounded on the way.

The rows are made on demand, as there is one for each width, group size and scale type:
``int4_g32_f16`` is symmetric (zero point 8), ``int4_g32_f16_z`` has a zero point in each group, and
``int4_g32_f16_m`` a minimum of the scale's type, as GGUF's q4_1 has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats
from nybble.checkpoint.encodings.blocks import as_bytes, fields
from nybble.checkpoint.encodings.plain import ROWS as PLAIN

BITS = (2, 3, 4, 8)
SCALES = {"f32": 4, "f16": 2, "bf16": 2}
"""Types of scales, and their bytes."""
MAX_GROUP = 1 << 20

_NAME = re.compile(r"int([2348])_g([1-9][0-9]{0,6})_(f32|f16|bf16)(_z|_m)?")
_CHUNK = 1 << 20  # elements worked on at a time
_PLAIN = {row.name: row for row in PLAIN}


@dataclass(frozen=True)
class AffineFormat:
    """What the name of an affine encoding says."""

    bits: int
    group_size: int
    """Elements that share a scale: the encoding's ``block_size``."""
    scale: str
    """``f32``, ``f16`` or ``bf16``."""
    has_zero_point: bool
    """One byte a group, in files as many bits as a code; without it the zero point is ``2 ** (bits - 1)``."""
    has_minimum: bool = False
    """A number of the scale's type a group, in place of a zero point: what the code 0 means."""

    @property
    def name(self) -> str:
        """As in the table of encodings."""
        suffix = "_z" if self.has_zero_point else "_m" if self.has_minimum else ""
        return f"int{self.bits}_g{self.group_size}_{self.scale}{suffix}"

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return SCALES[self.scale]

    @property
    def header_bytes(self) -> int:
        """Bytes before a group's codes."""
        return self.scale_bytes * (1 + self.has_minimum) + self.has_zero_point

    @property
    def code_bytes(self) -> int:
        """Bytes of a group's codes."""
        return self.group_size * self.bits // 8

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return int(2 ** (self.bits - 1))


@dataclass(frozen=True)
class AffineParts:
    """An affine matrix taken apart.

    ``codes`` uint8 (rows, columns), one code a byte; ``scales`` the scales' bits, uint8
    (rows, groups, scale_bytes), so that no rounding can happen; ``zero_points`` uint8 (rows, groups)
    or None; ``minima`` as the scales or None.
    """

    codes: Bytes
    scales: Bytes
    zero_points: Bytes | None
    minima: Bytes | None = None


def affine_format(name: str) -> AffineFormat | None:
    """The format that an encoding's name spells, or None where it is no affine one."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    found = AffineFormat(int(match[1]), int(match[2]), match[3], match[4] == "_z", match[4] == "_m")
    if found.group_size > MAX_GROUP or found.group_size * found.bits % 8:
        return None
    return found


def affine_encoding(
    bits: int, group_size: int, scale: str = "f16", *, zero_point: bool = False, minimum: bool = False
) -> Encoding:
    """The row of an affine encoding.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: elements of a row that share a scale.
        scale: ``f32``, ``f16`` or ``bf16``.
        zero_point: whether each group has its own.
        minimum: whether each group has one instead of a zero point; nothing is rounded to these.

    Raises:
        ValueError: there is no such encoding.
    """
    wanted = AffineFormat(bits, group_size, scale, zero_point, minimum)
    if affine_format(wanted.name) != wanted:
        raise ValueError(f"there is no encoding {wanted.name}: bits {BITS}, whole bytes a group, {SCALES}")
    return _row(wanted)


@lru_cache(maxsize=256)
def _row(form: AffineFormat) -> Encoding:
    return Encoding(
        name=form.name,
        block_size=form.group_size,
        block_bytes=form.header_bytes + form.code_bytes,
        dequantize=_dequantizer(form),
        quantize=None if form.has_minimum else _quantizer(form),
        layout=_layout(form),
        source="nybble; values as in https://github.com/microsoft/onnxruntime/blob/main/docs/"
        "ContribOperators.md#com.microsoft.MatMulNBits",
        spare_bits=8 - form.bits if form.has_zero_point else 0,
    )


def split(data: Bytes, columns: int, form: AffineFormat) -> AffineParts:
    """Takes encoded rows apart. ``data``: flat uint8 of whole rows with ``columns`` elements."""
    groups = columns // form.group_size
    size = form.header_bytes + form.code_bytes
    blocks = as_bytes(form.name, data).reshape(data.size // (groups * size), groups, size)
    return AffineParts(
        codes=unpack(blocks[..., form.header_bytes :], form).reshape(len(blocks), columns),
        scales=np.ascontiguousarray(blocks[..., : form.scale_bytes]),
        zero_points=np.ascontiguousarray(blocks[..., form.scale_bytes]) if form.has_zero_point else None,
        minima=np.ascontiguousarray(blocks[..., form.scale_bytes : form.header_bytes])
        if form.has_minimum
        else None,
    )


def join(parts: AffineParts, form: AffineFormat) -> Bytes:
    """Encoded rows of the parts: flat uint8, the reverse of ``split``."""
    rows, columns = parts.codes.shape
    groups = columns // form.group_size
    if columns % form.group_size or parts.scales.shape != (rows, groups, form.scale_bytes):
        raise ValueError(f"{form.name}: codes {parts.codes.shape} and scales {parts.scales.shape} do not fit")
    out = np.empty((rows, groups, form.header_bytes + form.code_bytes), np.uint8)
    out[..., : form.scale_bytes] = parts.scales
    if form.has_zero_point:
        if parts.zero_points is None or parts.zero_points.shape != (rows, groups):
            raise ValueError(f"{form.name}: zero points of shape ({rows}, {groups}) are needed")
        out[..., form.scale_bytes] = parts.zero_points
    if form.has_minimum:
        if parts.minima is None or parts.minima.shape != parts.scales.shape:
            raise ValueError(f"{form.name}: minima of shape {parts.scales.shape} are needed")
        out[..., form.scale_bytes : form.header_bytes] = parts.minima
    out[..., form.header_bytes :] = pack(parts.codes.reshape(rows, groups, form.group_size), form)
    return out.reshape(-1)


def pack(codes: Bytes, form: AffineFormat) -> Bytes:
    """Codes (..., group_size), one a byte, as the bytes of a group (..., code_bytes)."""
    if form.bits == 8:
        return codes
    if form.bits == 4:
        halves = codes.reshape(*codes.shape[:-1], -1, 2, _half(form))
        return (halves[..., 0, :] | (halves[..., 1, :] << np.uint8(4))).reshape(*codes.shape[:-1], -1)
    bits = np.unpackbits(codes[..., None], axis=-1, count=form.bits, bitorder="little")
    return np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: Bytes, form: AffineFormat) -> Bytes:
    """The reverse of ``pack``."""
    if form.bits == 8:
        return np.ascontiguousarray(packed)
    if form.bits == 4:
        halves = packed.reshape(*packed.shape[:-1], -1, 1, _half(form))
        both = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-2)
        return both.reshape(*packed.shape[:-1], -1)
    if form.bits == 2:
        return fields(packed, 2)
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, form.bits)
    return np.packbits(bits, axis=-1, bitorder="little")[..., 0]


def from_sequential(packed: Bytes, form: AffineFormat) -> Bytes:
    """Packed codes (..., code_bytes) in ONNX's order, code 2i low and 2i + 1 high in byte i, in ours.

    Much quicker than unpacking and packing. Other widths than four bits are packed alike in both.
    """
    half = _half(form)
    if form.bits != 4 or half == 1:
        return packed
    pairs = packed.reshape(*packed.shape[:-1], -1, 2, half // 2)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    out = np.empty((*first.shape, 2), np.uint8)
    out[..., 0] = (first & np.uint8(15)) | (second << np.uint8(4))
    out[..., 1] = (first >> np.uint8(4)) | (second & np.uint8(0xF0))
    return out.reshape(packed.shape)


def to_sequential(packed: Bytes, form: AffineFormat) -> Bytes:
    """The reverse of ``from_sequential``."""
    half = _half(form)
    if form.bits != 4 or half == 1:
        return packed
    pairs = packed.reshape(*packed.shape[:-1], -1, half // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = np.empty((*even.shape[:-1], 2, half // 2), np.uint8)
    out[..., 0, :] = (even & np.uint8(15)) | (odd << np.uint8(4))
    out[..., 1, :] = (even >> np.uint8(4)) | (odd & np.uint8(0xF0))
    return out.reshape(packed.shape)


def join_sequential(
    packed: Bytes,
    scales: Bytes,
    zero_points: Bytes | None,
    form: AffineFormat,
    minima: Bytes | None = None,
) -> Bytes:
    """Encoded rows from codes that are packed in ONNX's order: flat uint8, in one pass over memory.

    ``packed`` is uint8 (rows, groups, code_bytes); the others are as in ``AffineParts``.
    """
    rows, groups = packed.shape[:2]
    if packed.shape != (rows, groups, form.code_bytes) or scales.shape != (rows, groups, form.scale_bytes):
        raise ValueError(f"{form.name}: codes {packed.shape} and scales {scales.shape} do not fit")
    if (zero_points is not None) != form.has_zero_point or (
        zero_points is not None and zero_points.shape != (rows, groups)
    ):
        raise ValueError(f"{form.name}: zero points do not fit")
    if (minima is not None) != form.has_minimum or (minima is not None and minima.shape != scales.shape):
        raise ValueError(f"{form.name}: minima do not fit")
    if minima is not None:
        scales = np.concatenate([scales, minima], axis=-1)
    out = np.empty((rows * groups, form.header_bytes + form.code_bytes), np.uint8)
    if form.bits == 4 and form.group_size % 32 == 0:
        from nybble import _core

        _core.join_nibbles(
            np.ascontiguousarray(packed).reshape(-1),
            np.ascontiguousarray(scales).reshape(-1),
            None if zero_points is None else np.ascontiguousarray(zero_points).reshape(-1),
            rows * groups,
            form.group_size,
            out.reshape(-1),
        )
        return out.reshape(-1)
    out[:, : scales.shape[-1]] = scales.reshape(rows * groups, -1)
    if zero_points is not None:
        out[:, form.scale_bytes] = zero_points.reshape(-1)
    out[:, form.header_bytes :] = from_sequential(packed, form).reshape(rows * groups, -1)
    return out.reshape(-1)


def scale_values(scales: Bytes, form: AffineFormat) -> Floats:
    """Bits of scales (..., scale_bytes) as float32 (...)."""
    return _PLAIN[form.scale].dequantize(scales.reshape(-1)).reshape(scales.shape[:-1])


def _half(form: AffineFormat) -> int:
    """Nibbles lie as in GGUF's blocks: element i of 32 low, element i + 16 high in byte i."""
    return 16 if form.group_size % 32 == 0 else 1


def _dequantizer(form: AffineFormat) -> Callable[[Bytes], Floats]:
    size = form.header_bytes + form.code_bytes
    step = max(1, _CHUNK // form.group_size)

    def dequantize(data: Bytes) -> Floats:
        flat = as_bytes(form.name, data)
        if flat.size % size:
            raise ValueError(f"{form.name}: {flat.size} bytes are not a multiple of the block's {size} bytes")
        blocks = flat.reshape(-1, size)
        out = np.empty((len(blocks), form.group_size), np.float32)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), step):
                part = blocks[start : start + step]
                scale = scale_values(np.ascontiguousarray(part[:, : form.scale_bytes]), form)
                codes = unpack(part[:, form.header_bytes :], form).astype(np.float32)
                if form.has_zero_point:
                    codes -= part[:, form.scale_bytes : form.header_bytes].astype(np.float32)
                elif not form.has_minimum:
                    codes -= np.float32(form.middle)
                codes *= scale[:, None]
                if form.has_minimum:
                    lowest = np.ascontiguousarray(part[:, form.scale_bytes : form.header_bytes])
                    codes += scale_values(lowest, form)[:, None]
                out[start : start + step] = codes
        return out.reshape(-1)

    return dequantize


def _quantizer(form: AffineFormat) -> Callable[[Floats], Bytes]:
    """Round to nearest, with the step of each group searched for: ``quantize_groups`` says how."""
    size = form.header_bytes + form.code_bytes

    def quantize(values: Floats) -> Bytes:
        from nybble import _core

        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size % form.group_size:
            raise ValueError(
                f"{form.name}: {flat.size} elements are not a multiple of the block size {form.group_size}"
            )
        if not np.isfinite(flat).all():
            bad = int(np.flatnonzero(~np.isfinite(flat))[0])
            raise ValueError(
                f"{form.name}: element {bad} is {flat[bad]}; only finite values can be quantized"
            )
        out = np.empty(flat.size // form.group_size * size, np.uint8)
        fits = _core.quantize_affine(flat, form.bits, form.group_size, form.scale, form.has_zero_point, out)
        if not fits:
            raise ValueError(f"{form.name}: a scale does not fit in {form.scale}")
        return out

    return quantize


def _layout(form: AffineFormat) -> str:
    head, end = form.header_bytes, form.header_bytes + form.code_bytes
    zero = f" {form.scale_bytes} u8 zero point |" if form.has_zero_point else ""
    if form.has_minimum:
        zero = f" {form.scale_bytes} {form.scale} minimum |"
    order = {
        8: "one code a byte",
        4: f"nibbles: of each {2 * _half(form)} codes, code i low and code i + {_half(form)} high in byte i",
    }.get(form.bits, f"codes of {form.bits} bits one after another, lowest bits first")
    middle = "zero point" if form.has_zero_point else str(form.middle)
    value = "code * scale + minimum, each rounded" if form.has_minimum else f"(code - {middle}) * scale"
    return f"""\
 | 0 {form.scale} scale |{zero} {head} codes | {end}
   {order}
 value = {value}"""
