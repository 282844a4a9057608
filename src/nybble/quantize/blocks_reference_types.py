"""What ``native/quantize`` does with each type, in NumPy: the numbers that go with the searches.

``reference`` is to ``quantize_blocks`` what a plain description is to a fast program: the values that it
returns are those of the native core's blocks, to the bit. It takes seconds where the native core takes
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from nybble.checkpoint.encodings import ENCODINGS
from nybble.checkpoint.encodings.mx import half_e8m0, half_ue4m3
from nybble.quantize.blocks_reference import (
    Candidate,
    Floats,
    Levels,
    One,
    Zero,
    block_weights,
    blocks_of,
    e2m1_levels,
    even_levels,
    inverse,
    iq4_levels,
    one_scale,
    with_minimum,
)
from nybble.quantize.blocks_reference_grids import CODEBOOKS, codebook_super_block
from nybble.quantize.blocks_reference_k import affine_super_block, scale_super_block

Reference = Callable[[Floats, Floats | None], Floats]
"""Blocks (n, block_size) and the importance (block_size,) of their columns, or None, to what is decoded."""

# -- ends: the levels that the largest value of a block is tried at ------------------------------------

Q4_0 = (-8.0, 7.5, -7.4, -8.6, -6.8, 6.8, -7.7, -8.3, 7.1, 7.9, -9.2, 8.4)
Q5_0 = (-16.0, 15.5, -15.2, -16.6, -14.6, 14.6, -15.6, -16.3, 15.1, 15.9, -17.2, 16.4)
Q8_0 = (-128.0, 127.0, -127.5, 127.5, -126.5, -128.5)
IQ4 = (
    -127.0, 113.0, -118.0, 107.0, -110.0, 120.0, -134.0, 100.0, -122.0, 116.0, -103.0, -114.0, 96.0, -106.0,
    104.0, -98.0, 110.0, -130.0, 124.0, -142.0, 92.0, -94.0, 88.0, -88.0,
)  # fmt: skip
Q2_0 = (2.0, -2.0, 2.5, -2.5, 3.0, -3.0, 2.2, -2.2, 3.5, -3.5)
Q3_K = (
    -4.0, 3.5, -3.5, -4.5, 3.0, -3.0, 4.0, -5.0, -4.2, 3.8, 2.6, -2.7, -3.8, 3.2, -3.2, 2.8, -2.4, 4.4,
    -5.6, 2.3,
)  # fmt: skip
Q6_K = (
    -32.0, 31.0, -31.0, -33.0, 31.5, -30.4, -32.4, 30.5, -31.5, 30.0, -29.7, 32.0, -33.6, 29.4, -29.0, 31.2,
)  # fmt: skip
TERNARY = (1.0, 1.6, 2.2, 2.8, 3.7, 5.5)

# -- candidates for scale and minimum ------------------------------------------------------------------

FEW: tuple[Candidate, ...] = ((0.4, -0.2),)
MANY: tuple[Candidate, ...] = (
    (0.0, 0.0), (0.6, -0.3), (0.5, 0.0), (0.5, -0.5), (1.2, -0.6), (1.0, 0.0), (1.0, -1.0), (-0.4, 0.2),
    (1.8, -0.9), (1.6, -0.3), (1.6, -1.3), (2.4, -1.2), (0.3, -0.15), (0.9, -0.45), (0.25, 0.0),
    (0.25, -0.25), (0.75, 0.0), (0.75, -0.75), (-0.2, 0.1), (1.5, -0.75),
)  # fmt: skip
Q2_K: tuple[Candidate, ...] = (
    (0.0, 0.0), (0.3, -0.15), (0.6, -0.3), (0.9, -0.45), (0.5, 0.0), (0.5, -0.5), (1.0, 0.0), (1.0, -1.0),
    (-0.3, 0.15), (1.2, -0.6), (1.5, 0.0), (1.5, -1.5), (0.75, -0.75), (0.75, 0.0), (0.25, 0.0),
    (0.25, -0.25), (1.5, -0.75), (1.0, -0.5), (2.0, -1.0), (-0.6, 0.3),
)  # fmt: skip

MXFP4_SCALES = (0.125, 0.25, 0.0625)
"""Scales of doubled levels, for a largest value of 1 up to 2."""
NVFP4_STEPS = (0, 1, 2, -1, 3, 4)
"""Away from the code of the scale that takes the largest value to the largest level."""


def reference(values: Floats, name: str, importance: Floats | None = None) -> Floats:
    """What ``quantize_blocks`` makes of float32 (rows, columns), decoded: float32 (rows, columns)."""
    size = ENCODINGS[name].block_size
    quantize = REFERENCES[name]
    if importance is None:
        return quantize(values.reshape(-1, size), None).reshape(values.shape)
    out = np.empty_like(values)
    for start in range(0, values.shape[1], size):
        one = slice(start, start + size)
        out[:, one] = quantize(np.ascontiguousarray(values[:, one]), importance[one])
    return out


def _one_scale(
    values: Floats,
    importance: Floats | None,
    *,
    levels: Levels,
    ends: tuple[float, ...],
    few: int | None = None,
    rounds: int = 2,
) -> Floats:
    """``few``: how many of the ends are tried, without rounds, where there is no importance."""
    if importance is None and few is not None:
        return one_scale(values, importance, levels, ends[:few], 0)
    return one_scale(values, importance, levels, ends, rounds)


def _with_minimum(values: Floats, importance: Floats | None, *, high: int) -> Floats:
    if importance is None:
        return with_minimum(values, importance, high, FEW, 1)
    return with_minimum(values, importance, high, MANY, 4)


def _codebook(values: Floats, importance: Floats | None, *, name: str) -> Floats:
    return codebook_super_block(values, importance, CODEBOOKS[name])


def _q1_0(values: Floats, importance: Floats | None) -> Floats:
    """Signs; the scale is the mean magnitude."""
    blocks = blocks_of(values)
    w = block_weights(importance, values.shape[1])
    total, weight = np.zeros(len(values), np.float32), Zero
    for i in range(values.shape[1]):
        total, weight = total + w[i] * np.abs(blocks.x[:, i]), weight + w[i]
    result: Floats = blocks.full(blocks.as_half(total / weight)) * np.where(blocks.x < 0, -One, One)
    return result


def _e2m1_error(x: Floats, w: Floats, scale: Floats) -> Floats:
    """sum(w (x - scale * level)^2) of blocks (n, size) at scales (n,) of doubled levels."""
    per_level = inverse(scale)
    error = np.zeros(len(x), np.float32)
    for i in range(x.shape[1]):
        difference = x[:, i] - scale * e2m1_levels(x[:, i] * per_level)
        error = error + difference * (w[i] * difference)
    return error


def _mxfp4(values: Floats, importance: Floats | None) -> Floats:
    """The scale is a power of two."""
    blocks = blocks_of(values)
    w = block_weights(importance, 32)
    best, best_error = np.full(len(values), 0.25, np.float32), np.full(len(values), 1e30, np.float32)
    for tried in MXFP4_SCALES:
        scale = np.full_like(best, tried)
        error = _e2m1_error(blocks.x, w, scale)
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    best = np.maximum(best, np.float32(2.0**-126) / blocks.unit)
    exponent = ((best * blocks.unit).view(np.uint32) >> np.uint32(23)) + np.uint32(1)
    full = half_e8m0(exponent.astype(np.uint8))[:, None]
    return full * e2m1_levels(blocks.x * inverse(best)[:, None])


def _nvfp4(values: Floats, importance: Floats | None) -> Floats:
    """A scale for every 16 values, unsigned e4m3."""
    blocks = blocks_of(values)
    w = block_weights(importance, 64)
    table = half_ue4m3(np.arange(127, dtype=np.uint8))
    out = np.empty_like(values)
    for start in range(0, 64, 16):
        one = slice(start, start + 16)
        x = blocks.x[:, one]
        reach = np.abs(x).max(axis=1) * np.float32(1 / 12) * blocks.unit
        middle = np.searchsorted(table, reach, side="right") - 1  # the largest scale that is not above it
        best, best_error = middle, np.full(len(x), 1e30, np.float32)
        for step in NVFP4_STEPS:
            code = np.clip(middle + step, 0, 126)
            error = _e2m1_error(x, w[one], table[code] / blocks.unit)
            better = error < best_error
            best, best_error = np.where(better, code, best), np.where(better, error, best_error)
        levels = e2m1_levels(x * inverse(table[best] / blocks.unit)[:, None])
        out[:, one] = table[best][:, None] * levels
    return out


REFERENCES: Mapping[str, Reference] = {
    "q4_0": partial(_one_scale, levels=even_levels(-8, 7), ends=Q4_0, few=4),
    "q5_0": partial(_one_scale, levels=even_levels(-16, 15), ends=Q5_0, few=4),
    "q8_0": partial(_one_scale, levels=even_levels(-128, 127), ends=Q8_0, few=2, rounds=1),
    "q4_1": partial(_with_minimum, high=15),
    "q5_1": partial(_with_minimum, high=31),
    "q2_k": partial(
        affine_super_block, candidates=Q2_K, sub_block=16, high=3, most=15, neighbours=1, polish=4, rounds=3
    ),
    "q4_k": partial(
        affine_super_block, candidates=MANY, sub_block=32, high=15, most=63, neighbours=1, polish=4, rounds=3
    ),
    "q5_k": partial(
        affine_super_block, candidates=MANY, sub_block=32, high=31, most=63, neighbours=1, polish=4, rounds=3
    ),
    "q3_k": partial(
        scale_super_block,
        levels=even_levels(-4, 3),
        ends=Q3_K,
        sub_block=16,
        least_scale=-32,
        polish=3,
        rounds=3,
    ),
    "q6_k": partial(
        scale_super_block,
        levels=even_levels(-32, 31),
        ends=Q6_K,
        sub_block=16,
        least_scale=-128,
        polish=2,
        rounds=3,
    ),
    "iq4_nl": partial(_one_scale, levels=iq4_levels, ends=IQ4),
    "iq4_xs": partial(
        scale_super_block, levels=iq4_levels, ends=IQ4, sub_block=32, least_scale=-32, polish=3, rounds=3
    ),
    **{name: partial(_codebook, name=name) for name in CODEBOOKS},
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "tq1_0": partial(_one_scale, levels=even_levels(-1, 1), ends=TERNARY, rounds=3),
    "tq2_0": partial(_one_scale, levels=even_levels(-1, 1), ends=TERNARY, rounds=3),
    "q1_0": _q1_0,
    "q2_0": partial(_one_scale, levels=even_levels(-1, 2), ends=Q2_0),
}
