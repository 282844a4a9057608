"""The searches for super-blocks of ``native/quantize`` in NumPy, to the bit; see ``blocks_reference.py``.

A super-block of 256 has float16 factors and sub-blocks with small whole scales. First each sub-block is
fitted by itself; the factors are such that the largest scale fits. Then, in turn, each sub-block takes the
best of the whole scales (and minima) next to what it has, and the factors are fitted to all codes by least
squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.quantize.blocks_reference import (
    AffineFit,
    Blocks,
    Candidate,
    Floats,
    Levels,
    One,
    Zero,
    block_weights,
    blocks_of,
    inverse,
    ratio,
    scale_sums,
    search_affine,
    search_scale,
)

Mask = npt.NDArray[np.bool_]


def _clip(x: Floats, low: float, high: float) -> Floats:
    return np.clip(x, np.float32(low), np.float32(high))


# -- scales only: q3_k, q6_k, iq4_xs -------------------------------------------------------------------


def scale_super_block(
    values: Floats,
    importance: Floats | None,
    levels: Levels,
    ends: Sequence[float],
    *,
    sub_block: int,
    least_scale: int,
    polish: int,
    rounds: int,
) -> Floats:
    """Super-blocks (n, 256): x is about d * scale * level, whole scales from ``least_scale``."""
    blocks = blocks_of(values)
    w = block_weights(importance, 256)
    starts = range(0, 256, sub_block)
    least, most = float(least_scale), float(-least_scale - 1)
    parts = []
    largest = magnitude = np.zeros(len(values), np.float32)
    for start in starts:
        one = slice(start, start + sub_block)
        part = ratio(*search_scale(blocks.x[:, one], w[one], levels, ends, polish))
        largest = np.where(magnitude < np.abs(part), part, largest)
        magnitude = np.maximum(np.abs(part), magnitude)
        parts.append(part)
    d = blocks.as_half(largest * (One / np.float32(least)))
    scales: list[Floats] = [np.rint(_clip(part * inverse(d), least, most)) for part in parts]
    for _ in range(rounds):
        xa: Floats = np.zeros_like(d)
        aa: Floats = np.zeros_like(d)
        for j, start in enumerate(starts):
            one = slice(start, start + sub_block)
            scales[j], xl, ll = _choose_scale(
                blocks.x[:, one], w[one], levels, d=d, old=scales[j], least=least, most=most
            )
            xa = xa + scales[j] * xl
            aa = aa + scales[j] * scales[j] * ll
        fitted = ratio(xa, aa)
        d = blocks.as_half(np.where(np.abs(fitted) > 0, fitted, d))
    out = np.empty_like(values)
    for j, start in enumerate(starts):
        one = slice(start, start + sub_block)
        full = blocks.full(d) * scales[j][:, None]
        out[:, one] = full * levels(blocks.x[:, one] * inverse(d * scales[j])[:, None])
    return out


def _choose_scale(
    x: Floats, w: Floats, levels: Levels, *, d: Floats, old: Floats, least: float, most: float
) -> tuple[Floats, Floats, Floats]:
    """The best of old, old - 1, old + 1, and its sums."""
    scale, best_xl, best_ll = old, np.zeros_like(d), np.zeros_like(d)
    best = np.full_like(d, 1e30)
    for step in (0, -1, 1):
        tried = _clip(old + np.float32(step), least, most)
        full = d * tried
        xl, ll = scale_sums(x, w, levels, inverse(full))
        error = full * (full * ll - xl - xl)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
        best_xl, best_ll = np.where(better, xl, best_xl), np.where(better, ll, best_ll)
    return scale, best_xl, best_ll


# -- scales and minima: q2_k, q4_k, q5_k ---------------------------------------------------------------


@dataclass
class _Sums:
    """Of w * code, w * code^2, w * x * code; and the error less sum(w x^2)."""

    q: Floats
    qq: Floats
    xq: Floats
    error: Floats

    def where(self, better: Mask, other: _Sums) -> _Sums:
        """The other's where it is better."""
        pairs = ((self.q, other.q), (self.qq, other.qq), (self.xq, other.xq), (self.error, other.error))
        return _Sums(*(np.where(better, new, old) for old, new in pairs))


def affine_super_block(
    values: Floats,
    importance: Floats | None,
    candidates: Sequence[Candidate],
    *,
    sub_block: int,
    high: int,
    most: int,
    neighbours: int,
    polish: int,
    rounds: int,
) -> Floats:
    """Super-blocks (n, 256): x is about d * scale * code - dmin * minimum; whole numbers 0 to ``most``."""
    blocks = blocks_of(values)
    w = block_weights(importance, 256)
    slices = [slice(start, start + sub_block) for start in range(0, 256, sub_block)]
    fits: list[AffineFit] = []
    sum_x, total = [], []
    largest_scale = largest_minimum = np.zeros(len(values), np.float32)
    for one in slices:
        given = None if importance is None else w[one]
        fit = search_affine(blocks.x[:, one], given, high, candidates, polish, below_zero=True)
        fits.append(fit)
        largest_scale = np.maximum(fit.scale, largest_scale)
        largest_minimum = np.maximum(Zero - fit.offset, largest_minimum)
        sums, weight = np.zeros(len(values), np.float32), Zero
        for i in range(one.start, one.stop):
            sums = sums + w[i] * blocks.x[:, i]
            weight = weight + w[i]
        sum_x.append(sums)
        total.append(weight)
    d = blocks.as_half(largest_scale * (One / np.float32(most)))
    dmin = blocks.as_half(largest_minimum * (One / np.float32(most)))
    scales: list[Floats] = []
    minima: list[Floats] = []
    for fit in fits:
        scale = np.rint(_clip(fit.scale * inverse(d), 0, most))
        offset = fit.offset + (fit.scale - d * scale) * fit.mean_code
        scales.append(scale)
        minima.append(np.rint(_clip((Zero - offset) * inverse(dmin), 0, most)))
    for _ in range(rounds):
        zero: Floats = np.zeros_like(d)
        aa, ab, bb, xa, xb = zero, zero, zero, zero, zero
        for j, one in enumerate(slices):
            chosen = _choose_both(
                blocks.x[:, one],
                w[one],
                high,
                total=total[j],
                sum_x=sum_x[j],
                d=d,
                dmin=dmin,
                old=(scales[j], minima[j]),
                most=most,
                neighbours=neighbours,
            )
            (scales[j], minima[j]), best = chosen
            s, m = scales[j], minima[j]
            aa = aa + s * s * best.qq
            ab = ab + s * m * best.q
            bb = bb + m * m * total[j]
            xa = xa + s * best.xq
            xb = xb + m * sum_x[j]
        d, dmin = _refit(blocks, d, dmin, aa=aa, ab=ab, bb=bb, xa=xa, xb=xb)
    out = np.empty_like(values)
    for j, one in enumerate(slices):
        scale, offset = d * scales[j], Zero - dmin * minima[j]
        codes = np.rint(_clip((blocks.x[:, one] - offset[:, None]) * inverse(scale)[:, None], 0, high))
        full_d, full_m = blocks.full(d), blocks.full(dmin)
        out[:, one] = full_d * scales[j][:, None] * codes - full_m * minima[j][:, None]
    return out


def _sub_block_sums(
    x: Floats,
    w: Floats,
    high: int,
    *,
    total: np.float32,
    sum_x: Floats,
    scale: Floats,
    offset: Floats,
) -> _Sums:
    per_code = inverse(scale)
    q = qq = xq = np.zeros_like(scale)
    for i in range(x.shape[1]):
        code = np.rint(_clip((x[:, i] - offset) * per_code, 0, high))
        q = q + w[i] * code
        qq = qq + code * (w[i] * code)
        xq = xq + x[:, i] * (w[i] * code)
    cross = scale * q
    error = (
        scale * scale * qq + offset * (cross + cross + offset * total - sum_x - sum_x) - (scale + scale) * xq
    )
    return _Sums(q, qq, xq, error)


def _choose_both(
    x: Floats,
    w: Floats,
    high: int,
    *,
    total: np.float32,
    sum_x: Floats,
    d: Floats,
    dmin: Floats,
    old: tuple[Floats, Floats],
    most: int,
    neighbours: int,
) -> tuple[tuple[Floats, Floats], _Sums]:
    """The best of scale - 1, scale, scale + 1, each with the minima around the one that suits it."""
    scale, minimum = old
    best = _sub_block_sums(
        x, w, high, total=total, sum_x=sum_x, scale=d * scale, offset=Zero - dmin * minimum
    )
    mean = best.q / total
    for step in (-1, 0, 1):
        s = _clip(old[0] + np.float32(step), 0, most)
        middle = np.rint(old[1] + (s - old[0]) * d * mean * inverse(dmin))
        for other in range(-neighbours, neighbours + 1):
            if step == 0 and other == 0:
                continue
            m = _clip(middle + np.float32(other), 0, most)
            sums = _sub_block_sums(x, w, high, total=total, sum_x=sum_x, scale=d * s, offset=Zero - dmin * m)
            better = sums.error < best.error
            best = best.where(better, sums)
            scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
    return (scale, minimum), best


def _refit(
    blocks: Blocks,
    d: Floats,
    dmin: Floats,
    *,
    aa: Floats,
    ab: Floats,
    bb: Floats,
    xa: Floats,
    xb: Floats,
) -> tuple[Floats, Floats]:
    """Least squares of x = d a - dmin b; d alone where that has no positive solution."""
    determinant = aa * bb - ab * ab
    both = aa * bb * np.float32(1e-5) < determinant
    d2, m2 = ratio(xa * bb - xb * ab, determinant), ratio(xa * ab - xb * aa, determinant)
    good = both & (np.minimum(d2, m2) > 0)
    alone = ratio(xa + dmin * ab, aa)
    d1 = np.where(alone > 0, alone, d)
    return blocks.as_half(np.where(good, d2, d1)), blocks.as_half(np.where(good, m2, dmin))
