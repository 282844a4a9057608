"""GGUF's integer block types and group-wise affine integers: from each to each, exactly or not at all.

Nothing is rounded. Blocks are taken apart into codes, scales and zero points or minima, and put together
in the other encoding; where something does not fit there, the first such block is named. Exact means: both
sides dequantize to the same float32, bit for bit.

================  ====================  ====================================================
GGUF              affine                exact
================  ====================  ====================================================
q4_0              int4_g32_f16          always; the bytes are the same
q8_0, q5_0        int8_g32_f16          always
q6_k              int8_g16_f32          always (a scale is d * sc, of 19 bits)
q4_1              int4_g32_f16_m        always; the bytes are the same
q4_1, q4_k        int4_g32_f32_m        always
q5_1              int8_g32_f16_m        always
q5_1, q5_k        int8_g32_f32_m        always
q4_1, q4_k        int4_g32_..._z        where each minimum is a whole multiple of its scale
q5_1, q5_k        int8_g32_..._z        where each minimum is a whole multiple of its scale
================  ====================  ====================================================

and back, and any other pair, where codes, scales and group sizes fit: scales can be repeated for
smaller groups, and shared by larger ones if they are equal.

Why the values are the same: scales have at most 24 bits and products are rounded to float32 once, on
both sides from the same exact number. ``d * code + m`` with ``m = -zero_point * d`` is the exact
number ``(code - zero_point) * d``, which float32 holds. Only the sign of a zero could differ, where a
minimum stands beside a negative scale: such blocks are refused. So are scales that are not numbers,
except where the bytes stay as they are or become wider. Between minima and minima nothing is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import (
    AffineParts,
    affine_format,
    join,
    scale_values,
    split,
)
from nybble.checkpoint.encodings.base import Bytes
from nybble.convert.transcode.ggml_blocks import BLOCK_TYPES
from nybble.convert.transcode.groups import DoesNotFit, Groups, refuse
from nybble.convert.transcode.scales import scale_bytes

_CHUNK = 1 << 20  # elements worked on at a time
_SAME_BYTES = {
    ("q4_0", "int4_g32_f16"),
    ("int4_g32_f16", "q4_0"),
    ("q4_1", "int4_g32_f16_m"),
    ("int4_g32_f16_m", "q4_1"),
}


@dataclass(frozen=True)
class Inexact:
    """What the target encoding cannot hold."""

    block: int
    """Index of the first such block of the source."""
    reason: str
    """Why, for people: ``its minimum is not a whole multiple of its scale``."""


@dataclass(frozen=True)
class _Side:
    """What matters of an encoding here."""

    group_size: int
    middle: int | None
    """Zero point of all groups; None: each has its own, or a minimum."""
    minima: bool
    """Whether groups have minima."""
    highest: int
    """Largest code."""
    scale: str
    """Type of the scales; ``product``: a float16 times a small integer."""


def _side(name: str) -> _Side | None:
    block = BLOCK_TYPES.get(name)
    if block is not None:
        scale = "f16" if block.groups == 1 else "product"
        return _Side(block.group_size, block.middle, block.middle is None, block.highest, scale)
    form = affine_format(name)
    if form is None:
        return None
    middle = None if form.has_zero_point or form.has_minimum else form.middle
    return _Side(form.group_size, middle, form.has_minimum, 2**form.bits - 1, form.scale)


def relation(source: str, target: str) -> Literal["exact", "depends"] | None:
    """How an encoding goes into another here: always exactly, depending on the data, or not at all.

    None means that there is no such way (group sizes of which none divides the other, or an encoding
    that is not one of integers with scales); it says nothing about rounding ways elsewhere.
    """
    ours, theirs = _side(source), _side(target)
    if ours is None or theirs is None:
        return None
    if ours.group_size % theirs.group_size and theirs.group_size % ours.group_size:
        return None
    if source == target:
        return "exact"
    scale_fits = ours.scale == theirs.scale != "product" or theirs.scale == "f32"
    size_fits = ours.group_size % theirs.group_size == 0
    return "exact" if scale_fits and size_fits and _codes_fit(source, target) else "depends"


def _codes_fit(source: str, target: str) -> bool:
    """Whether all codes and zero points that the source may have fit."""
    ours, theirs = _side(source), _side(target)
    assert ours is not None and theirs is not None
    if theirs.minima and (target in BLOCK_TYPES or not ours.minima):
        # A minimum must be a number of its type, and not stand beside a negative scale.
        return (source, target) in _SAME_BYTES
    if ours.middle is None:
        return theirs.middle is None and ours.minima == theirs.minima and ours.highest <= theirs.highest
    shift = _middle(theirs) - ours.middle
    return shift >= 0 and ours.highest + shift <= theirs.highest


def _middle(side: _Side) -> int:
    """The zero point that symmetric codes get."""
    return (side.highest + 1) // 2 if side.middle is None else side.middle


def transcode(data: Bytes, source: str, target: str, columns: int) -> Bytes | Inexact:
    """Encoded rows in another encoding.

    Args:
        data: flat uint8, whole rows.
        source: name of their encoding.
        target: name of the wanted one.
        columns: elements in a row; a multiple of both encodings' block sizes.

    Returns:
        Flat uint8; or the first block of the source that the target cannot hold.

    Raises:
        ValueError: there is no way between the two (``relation`` says None), or rows do not fit.
    """
    if relation(source, target) is None:
        raise ValueError(f"there is no exact way from {source} to {target}")
    ours, theirs = encoding(source), encoding(target)
    for side in (ours, theirs):
        if columns % side.block_size:
            raise ValueError(f"{side.name}: rows of {columns} are no multiple of {side.block_size}")
    if source == target or (source, target) in _SAME_BYTES:
        return data
    elements = data.size // ours.block_bytes * ours.block_size
    out = np.empty(theirs.nbytes(elements), np.uint8)
    common = math.lcm(ours.block_size, theirs.block_size)
    step = max(1, _CHUNK // common) * common
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        chunk = data[ours.nbytes(start) : ours.nbytes(stop)]
        result = _transcode_chunk(chunk, source, target)
        if isinstance(result, Inexact):
            first = _first(chunk, source, target, result)
            return Inexact(start // ours.block_size + first.block, first.reason)
        out[theirs.nbytes(start) : theirs.nbytes(stop)] = result
    return out


def _first(data: Bytes, source: str, target: str, found: Inexact) -> Inexact:
    """The first block that does not fit: checks come one after another, each over all blocks."""
    ours = encoding(source)
    common = math.lcm(ours.block_size, encoding(target).block_size)
    while before := found.block * ours.block_size // common * common:
        earlier = _transcode_chunk(data[: ours.nbytes(before)], source, target)
        if not isinstance(earlier, Inexact):
            break
        found = earlier
    return found


def _transcode_chunk(data: Bytes, source: str, target: str) -> Bytes | Inexact:
    ours, theirs = _side(source), _side(target)
    assert ours is not None and theirs is not None
    size = ours.group_size  # of the groups that an error counts
    try:
        groups = _take(data, source)
        if ours.minima != theirs.minima and (source if ours.minima else target) not in BLOCK_TYPES:
            groups.check_products()
        if not theirs.minima:
            groups = groups.with_zero_points()
        if ours.middle is not None or theirs.middle is not None:
            groups = groups.centred(_middle(theirs))
        groups = groups.of_size(theirs.group_size)
        size = theirs.group_size
        groups.check_codes(theirs.highest)
        if theirs.minima:
            groups = groups.with_minima()
        return _make(groups, target)
    except DoesNotFit as error:
        return Inexact(error.group * size // encoding(source).block_size, error.reason)


def _take(data: Bytes, name: str) -> Groups:
    block = BLOCK_TYPES.get(name)
    if block is not None:
        return block.take(data.reshape(-1, encoding(name).block_bytes))
    form = affine_format(name)
    assert form is not None
    # Each group as a row of its own.
    parts = split(data, form.group_size, form)
    scales = scale_values(parts.scales[:, 0], form)
    minima = None
    if parts.minima is not None:
        minima = scale_values(parts.minima[:, 0], form)
        points = np.zeros(len(scales), np.int16)
    elif parts.zero_points is None:
        points = np.full(len(scales), form.middle, np.int16)
    else:
        points = parts.zero_points[:, 0].astype(np.int16)
    return Groups(parts.codes.astype(np.int16), scales, points, minima)


def _make(groups: Groups, name: str) -> Bytes:
    block = BLOCK_TYPES.get(name)
    if block is not None:
        return block.make(groups).reshape(-1)
    form = affine_format(name)
    assert form is not None
    refuse((groups.zero_points < 0) | (groups.zero_points > 255), "its zero point does not fit in 0 to 255")
    points = groups.zero_points.astype(np.uint8)[:, None] if form.has_zero_point else None
    scales = scale_bytes(groups.scales, form.scale)[:, None, :]
    minima = None
    if form.has_minimum:
        assert groups.minima is not None
        minima = scale_bytes(groups.minima, form.scale, "minimum")[:, None, :]
    return join(AffineParts(groups.codes.astype(np.uint8), scales, points, minima), form)
