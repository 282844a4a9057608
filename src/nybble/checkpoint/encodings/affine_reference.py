"""Rounding to the affine encodings in NumPy: what the native core's ``quantize_affine`` does, to the bit.

For each group several steps between codes are tried. The codes that a step gives are kept, and the
scale that fits them best follows by least squares: sum(v q) / sum(q q), rounded to its type. The
candidate with the smallest squared error is taken, the first of equals. That is round to nearest with a
search for the clipping; with the largest value alone as the step, errors are a fifth larger.

The squared error may count more in some columns than in others (``importance``). Groups of hundreds of
values, and weighted ones, are worth a search of much narrower ranges (``wide``): there the largest value
is far from the others, or of little importance. ``none`` is round to nearest as it is mostly understood:
the largest value, or with zero points the range, gets the outermost codes.

Sums are float64 in eight lanes, so that any vector width gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts, join, scale_values
from nybble.checkpoint.encodings.base import Bytes, Floats
from nybble.checkpoint.encodings.plain import ROWS as PLAIN

LANES = 8
SMALLEST = np.float32(2.0**-118)
"""Groups whose values are all smaller become zero."""
SYMMETRIC = (
    (-1.0, 0.0), (-1.0, -0.5), (-1.0, -1.0), (1.0, -1.0), (-1.0, 0.5), (-1.0, 1.0),
    (-1.0, 1.5), (1.0, -0.5), (1.0, 0.0), (1.0, 0.5), (1.0, -1.5), (-1.0, -1.5),
)  # fmt: skip
"""The value of largest magnitude would get the code sign * (2 ** (bits - 1) + offset)."""
SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
"""With a zero point: how much of the group's range the codes span."""
MOVES = (0, -1, 1)
"""Steps by which the zero point is moved."""
WIDE_SHARES = (0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
"""How much of the range is tried besides, in a wide search; the zero point is not moved then."""
Search = Literal["none", "narrow", "wide"]

_PLAIN = {row.name: row for row in PLAIN}
Doubles = npt.NDArray[np.float64]


def quantize_groups(
    groups: Floats, form: AffineFormat, search: Search = "narrow", importance: Floats | None = None
) -> Bytes:
    """Encoded groups of finite values (n, group_size): flat uint8.

    ``importance``: above 0, (n, group_size), what a squared error counts there; None: all alike.

    Raises:
        ValueError: a scale does not fit its type.
    """
    if search == "none":
        return _without_search(groups, form)
    count = len(groups)
    doubles = groups.astype(np.float64)
    weights = None if importance is None else importance.astype(np.float64)
    squares = _lanes(doubles * doubles if weights is None else (weights * doubles) * doubles)
    scales = np.zeros((count, form.scale_bytes), np.uint8)
    best_codes = np.zeros(groups.shape, np.float32)
    best_zero = np.full(count, 0 if form.has_zero_point else form.middle, np.float32)
    best_error = np.zeros(count)
    nothing = np.abs(groups).max(axis=1) < SMALLEST
    found = nothing.copy()
    for inverse, zero, allowed in _candidates(groups, form, wide=search == "wide"):
        low, high = (0, 2**form.bits - 1) if form.has_zero_point else (-form.middle, form.middle - 1)
        start = zero[:, None] if form.has_zero_point else np.float32(0)
        with np.errstate(invalid="ignore", over="ignore"):
            codes = np.clip(np.rint(groups * inverse[:, None]) + start, low, high) - start
        q = codes.astype(np.float64)
        vq = _lanes(doubles * q if weights is None else (weights * doubles) * q)
        qq = _lanes(q * q if weights is None else (weights * q) * q)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            stored = _stored((vq / qq).astype(np.float32), form)
            scale = scale_values(stored, form)
            error = squares - scale.astype(np.float64) * (2.0 * vq - scale.astype(np.float64) * qq)
        better = allowed & ~nothing & (qq > 0) & np.isfinite(scale) & (~found | (error < best_error))
        found |= better
        best_error = np.where(better, error, best_error)
        best_codes = np.where(better[:, None], codes, best_codes)
        best_zero = np.where(better, zero, best_zero)
        scales = np.where(better[:, None], stored, scales)
    if not found.all():
        raise ValueError(f"{form.name}: a scale does not fit in {form.scale}")
    return _joined(best_codes, best_zero, scales, form)


def _without_search(groups: Floats, form: AffineFormat) -> Bytes:
    """The scale follows from the extremes alone, and is rounded before the codes are made."""
    nothing = np.abs(groups).max(axis=1) < SMALLEST
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if form.has_zero_point:
            low, spread = _range(groups)
            wanted = spread / np.float32(2**form.bits - 1)
        else:
            wanted = _largest(groups) / np.float32(-form.middle)
        stored = _stored(np.where(nothing, np.float32(0), wanted), form)
        scale = scale_values(stored, form)
        if not np.isfinite(scale).all():
            raise ValueError(f"{form.name}: a scale does not fit in {form.scale}")
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    if form.has_zero_point:
        zero = np.clip(np.rint(-low * inverse), 0, 2**form.bits - 1).astype(np.float32)
    else:
        zero = np.full(len(groups), form.middle, np.float32)
    high = np.float32(2**form.bits - 1) - zero
    codes = np.rint(np.clip(groups * inverse[:, None], -zero[:, None], high[:, None]))
    return _joined(np.where(nothing[:, None], np.float32(0), codes), zero, stored, form)


def _joined(codes: Floats, zero: Floats, scales: Bytes, form: AffineFormat) -> Bytes:
    """Bytes of signed codes (n, group_size), zero points (n) and stored scales (n, scale_bytes)."""
    points = zero[:, None].astype(np.uint8) if form.has_zero_point else None
    unsigned = (codes + zero[:, None]).astype(np.uint8)
    return join(AffineParts(unsigned, scales[:, None, :], points), form)


def _candidates(
    groups: Floats, form: AffineFormat, *, wide: bool
) -> Iterator[tuple[Floats, Floats, npt.NDArray[np.bool_]]]:
    """Codes a unit of value, zero points, and whether there is such a candidate: (n) each."""
    everywhere = np.ones(len(groups), bool)
    wide_shares = WIDE_SHARES if wide else ()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if not form.has_zero_point:
            largest = _largest(groups)
            middle = np.full(len(groups), form.middle, np.float32)
            for sign, offset in SYMMETRIC:
                yield (
                    np.float32(sign) * (np.float32(form.middle) + np.float32(offset)) / largest,
                    middle,
                    everywhere,
                )
            for share in wide_shares:
                yield np.float32(-form.middle) / (largest * np.float32(share)), middle, everywhere
            return
        highest = np.float32(2**form.bits - 1)
        low, spread = _range(groups)
        usable = np.isfinite(spread)
        middle = np.rint(-low * (highest / spread))
        for share in SHARES:
            inverse = highest / (spread * np.float32(share))
            for move in MOVES:
                zero = middle + np.float32(move)
                yield inverse, zero, usable & (zero >= 0) & (zero <= highest)
        for share in wide_shares:
            yield highest / (spread * np.float32(share)), middle, usable & (middle <= highest)


def _largest(groups: Floats) -> Floats:
    """The value of largest magnitude, the first of equals."""
    place = np.abs(groups).argmax(axis=1)[:, None]
    return np.take_along_axis(groups, place, axis=1)[:, 0]


def _range(groups: Floats) -> tuple[Floats, Floats]:
    """The lowest value and the size of the range; zero is always in it."""
    low = np.minimum(groups.min(axis=1), np.float32(0))
    return low, np.maximum(groups.max(axis=1), np.float32(0)) - low


def _lanes(values: Doubles) -> Doubles:
    """Sums over the columns: column i in lane i % 8, then lanes in pairs."""
    sums = np.zeros((len(values), LANES))
    for start in range(0, values.shape[1], LANES):
        part = values[:, start : start + LANES]
        sums[:, : part.shape[1]] += part
    first = (sums[:, 0] + sums[:, 4]) + (sums[:, 2] + sums[:, 6])
    second = (sums[:, 1] + sums[:, 5]) + (sums[:, 3] + sums[:, 7])
    total: Doubles = first + second
    return total


def _stored(scale: Floats, form: AffineFormat) -> Bytes:
    bits = _PLAIN[form.scale].quantize
    assert bits is not None
    return bits(scale).reshape(len(scale), form.scale_bytes)
