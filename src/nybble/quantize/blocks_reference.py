"""The searches of ``native/quantize`` in NumPy, to the bit: slow, and plain.

Blocks lie along the first axis and are independent of each other; sums over a block's elements are added one
after the other in float32, as each lane of the native code does. Functions return what the blocks decode to.
Here: types with one scale (and minimum) a block. Super-blocks are in ``blocks_reference_k.py``, codebooks in
``blocks_reference_grids.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.iq_grids import IQ4_LEVELS

Floats = npt.NDArray[np.float32]
Levels = Callable[[Floats], Floats]
"""The level that is nearest to each value."""

Zero, One = np.float32(0), np.float32(1)


# -- blocks, weights, scales ---------------------------------------------------------------------------


@dataclass
class Blocks:
    """Blocks brought to a largest magnitude of 1 up to 2: ``x`` (blocks, size), value = x * unit."""

    x: Floats
    unit: Floats
    """(blocks,) powers of two."""

    def as_half(self, scale: Floats) -> Floats:
        """Scales (blocks,) as float16 would hold them."""
        half = (scale * self.unit + Zero).astype(np.float16).astype(np.float32)
        result: Floats = np.clip(half, -65504, 65504) / self.unit
        return result

    def full(self, scale: Floats) -> Floats:
        """Rounded scales as the file's reader sees them: (blocks, 1)."""
        return (scale * self.unit)[:, None]


def blocks_of(values: Floats) -> Blocks:
    """Scaled blocks of float32 (blocks, size)."""
    largest = np.abs(values).max(axis=1)
    power = power_of_two(largest)
    unit = np.where(power > 0, power, One)
    factor = np.where(power > 0, One / unit, Zero)
    return Blocks(values * factor[:, None], unit)


def block_weights(importance: Floats | None, size: int) -> Floats:
    """Weights (size,) of a block's columns, brought to a largest of 1 up to 2; ones without importance."""
    if importance is None or not importance.max() >= np.finfo(np.float32).tiny:
        return np.ones(size, np.float32)
    factor = One / power_of_two(importance.max(keepdims=True))
    result: Floats = np.maximum(importance * factor, np.float32(1e-6))
    return result


def power_of_two(x: Floats) -> Floats:
    """2^e of 2^e * fraction, at most 2^126; 0 for zero and subnormal numbers."""
    power = (x.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    result: Floats = np.minimum(power, np.float32(2.0**126))
    return result


def inverse(x: Floats) -> Floats:
    """1 / x; 0 where x is next to nothing."""
    small = ~(np.abs(x) > np.float32(1e-30))
    result: Floats = np.where(small, Zero, One / np.where(small, One, x))
    return result


def ratio(a: Floats, b: Floats) -> Floats:
    """a / b; 0 where b is no positive number."""
    good = b > np.float32(1e-37)
    return np.where(good, a / np.where(good, b, One), Zero)


# -- levels --------------------------------------------------------------------------------------------


def even_levels(low: int, high: int) -> Levels:
    """low, low + 1, ..., high; ties to even."""
    return lambda x: np.rint(np.clip(x, np.float32(low), np.float32(high)))


_IQ4 = np.array(IQ4_LEVELS, np.float32)
_IQ4_MIDDLES = (_IQ4[:-1] + _IQ4[1:]) * np.float32(0.5)


def iq4_levels(x: Floats) -> Floats:
    """The levels of iq4_nl; the lower of two that are as near."""
    result: Floats = _IQ4[(x[..., None] > _IQ4_MIDDLES).sum(axis=-1)]
    return result


def e2m1_levels(x: Floats) -> Floats:
    """Doubled 4-bit floats: 0, 1, 2, 3, 4, 6, 8, 12 with signs; ties to the even code."""
    a = np.minimum(np.abs(x), np.float32(12))
    step = np.where(a < 4, One, np.where(a < 8, np.float32(2), np.float32(4)))
    result: Floats = np.copysign(np.rint(a / step) * step, x)
    return result


# -- one scale -----------------------------------------------------------------------------------------


def scale_sums(x: Floats, w: Floats, levels: Levels, per_level: Floats) -> tuple[Floats, Floats]:
    """Sums of w * x * level and w * level^2 over each block, with the levels of x * per_level."""
    xl = np.zeros(len(x), np.float32)
    ll = np.zeros(len(x), np.float32)
    for i in range(x.shape[1]):
        level = levels(x[:, i] * per_level)
        xl = xl + x[:, i] * (w[i] * level)
        ll = ll + level * (w[i] * level)
    return xl, ll


def search_scale(
    x: Floats, w: Floats, levels: Levels, ends: Sequence[float], rounds: int
) -> tuple[Floats, Floats]:
    """The best sums; the scale is their ratio.

    Each end is a level that the value of largest magnitude may get. With given levels the best scale is
    xl / ll, and it takes xl^2 / ll off the squared error. ``rounds`` of new levels and a new scale follow.
    """
    largest = x[np.arange(len(x)), np.abs(x).argmax(axis=1)]
    steps = [inverse(largest) * np.float32(end) for end in ends]
    best_xl, best_ll = np.zeros(len(x), np.float32), np.ones(len(x), np.float32)
    for k in range(len(steps) + rounds):
        step = steps[k] if k < len(steps) else inverse(ratio(best_xl, best_ll))
        xl, ll = scale_sums(x, w, levels, step)
        better = best_xl * best_xl * ll < xl * xl * best_ll
        best_xl, best_ll = np.where(better, xl, best_xl), np.where(better, ll, best_ll)
    return best_xl, best_ll


def one_scale(
    values: Floats, importance: Floats | None, levels: Levels, ends: Sequence[float], rounds: int
) -> Floats:
    """Blocks (n, size) with one float16 scale."""
    blocks = blocks_of(values)
    xl, ll = search_scale(blocks.x, block_weights(importance, values.shape[1]), levels, ends, rounds)
    scale = blocks.as_half(ratio(xl, ll))
    return blocks.full(scale) * levels(blocks.x * inverse(scale)[:, None])


# -- scale and minimum ---------------------------------------------------------------------------------


@dataclass
class AffineFit:
    """x is about offset + scale * code; all (blocks,)."""

    scale: Floats
    offset: Floats
    mean_code: Floats
    low: Floats
    """The smallest value, or 0 if the offset may not be positive and that is smaller."""


Candidate = tuple[float, float]
"""Stretch and shift: the codes are those of 1 + stretch / high times the range, moved up by shift codes."""


def search_affine(
    x: Floats,
    w: Floats | None,
    high: float,
    candidates: Sequence[Candidate],
    rounds: int,
    *,
    below_zero: bool,
) -> AffineFit:
    """The best scale and offset; with ``below_zero`` the offset is not positive.

    ``w`` None: all columns weigh alike. Sums are of values and codes less those of the heaviest column, which
    can have nearly all of the weight; without weights less the smallest value.
    """
    low, top = x.min(axis=1), x.max(axis=1)
    if below_zero:
        low = np.minimum(low, Zero)
    weights = np.ones(x.shape[1], np.float32) if w is None else w
    heaviest = int(np.argmax(weights))
    base = low if w is None else x[:, heaviest]
    u = np.zeros(len(x), np.float32)
    total = Zero
    for i in range(x.shape[1]):
        u = u + weights[i] * (x[:, i] - base)
        total = total + weights[i]
    per_total = One / total
    per_range = inverse(top - low)
    most = Zero - base

    scale, offset, gain, mean = np.zeros_like(u), u * per_total, u * (u * per_total), np.zeros_like(u)
    if below_zero:
        above = most < offset
        gain = np.where(above, most * (u + u - most * total), gain)
        offset = np.where(above, most, offset)
    for k in range(len(candidates) + rounds):
        if k < len(candidates):
            stretch, shift = candidates[k]
            per_code = per_range * (np.float32(high) + np.float32(stretch))
            add = np.full_like(u, shift)
        else:
            per_code = inverse(scale)
            add = ((low - base) - offset) * per_code
        codes = np.rint(
            np.clip((x - low[:, None]) * per_code[:, None] + add[:, None], Zero, np.float32(high))
        )
        base_code = np.zeros_like(u) if w is None else codes[:, heaviest]
        q = np.zeros_like(u)
        qq, uq = q, q
        for i in range(x.shape[1]):
            c = codes[:, i] - base_code
            q = q + weights[i] * c
            qq = qq + c * (weights[i] * c)
            uq = uq + (x[:, i] - base) * (weights[i] * c)
        numerator = uq - q * (u * per_total)
        # Where one code has nearly all the weight, what is left is rounding noise: no scale then.
        difference = qq - q * (q * per_total)
        new_scale = np.where(qq * np.float32(2e-5) < difference, ratio(numerator, difference), Zero)
        new_offset = (u - new_scale * q) * per_total
        new_gain = u * (u * per_total) + new_scale * numerator
        if w is not None:
            new_offset = new_offset - new_scale * base_code
        if below_zero:
            above = most < new_offset
            if w is None:
                scale0 = ratio(uq - most * q, qq)
                gain0 = most * (u + u - most * total) + scale0 * scale0 * qq
            else:
                shifted = q + base_code * total
                scale0 = ratio(uq + base_code * u - most * shifted, qq + base_code * (q + shifted))
                e = most + scale0 * base_code
                gain0 = e * (u + u - e * total) + scale0 * (uq + uq - (e + e) * q - scale0 * qq)
            new_scale = np.where(above, scale0, new_scale)
            new_offset = np.where(above, most, new_offset)
            new_gain = np.where(above, gain0, new_gain)
        better = gain < new_gain
        gain, scale = np.where(better, new_gain, gain), np.where(better, new_scale, scale)
        offset, mean = np.where(better, new_offset, offset), np.where(better, base_code + q * per_total, mean)
    return AffineFit(scale, base + offset, mean, low)


def with_minimum(
    values: Floats, importance: Floats | None, high: int, candidates: Sequence[Candidate], rounds: int
) -> Floats:
    """Blocks (n, size) with a float16 scale and a float16 minimum."""
    blocks = blocks_of(values)
    w = block_weights(importance, values.shape[1])
    given = None if importance is None else w
    fit = search_affine(blocks.x, given, high, candidates, rounds, below_zero=False)
    room = np.float32(65504) / blocks.unit
    inside = np.minimum(np.maximum(fit.offset, Zero - room), room)
    offset = blocks.as_half(np.where(room < np.abs(fit.low), fit.offset, inside))
    scale = blocks.as_half(fit.scale)
    codes = np.rint(np.clip((blocks.x - offset[:, None]) * inverse(scale)[:, None], Zero, np.float32(high)))
    result: Floats = blocks.full(scale) * codes + blocks.full(offset)
    return result
