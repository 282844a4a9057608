"""The searches for codebook types of ``native/quantize`` in NumPy, to the bit; see ``blocks_reference.py``.

x is about unit * (2 scale + 1) * sign * entry, entries of 8 (iq2) or 4 (iq3) values from a codebook. The
native code finds the nearest entry from sums over the entry's halves; here each entry is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.iq_grids import grid
from nybble.quantize.blocks_reference import (
    Blocks,
    Floats,
    One,
    Zero,
    block_weights,
    blocks_of,
    inverse,
    ratio,
    search_scale,
)

ENDS = (1.0, 0.9, 1.15, 1.3, 1.5, 1.75)
FACTORS = (1.0, 0.9, 1.1)
_MOST = np.float32(15)


@dataclass(frozen=True)
class Codebook:
    """What a type's entries are."""

    name: str
    even_signs: bool
    """Whether only an even number of 8 values can be negative."""
    sub_block: int
    """Values with a scale of their own."""
    stored: float
    """The type's float16 is this times the unit."""

    @cached_property
    def entries(self) -> Floats:
        """(entries, values)."""
        return grid(self.name).astype(np.float32)

    @cached_property
    def order(self) -> npt.NDArray[np.intp]:
        """The order in which entries are tried: of equals the first is taken."""
        return np.concatenate([np.arange(k, len(self.entries), 4) for k in range(4)])

    def nearest_level(self, x: Floats) -> Floats:
        """The level that is nearest, whatever entries there are."""
        result: Floats
        if self.entries.shape[1] == 8:
            low = np.where(x < np.float32(16.5), np.float32(8), np.float32(25))
            result = np.where(x < np.float32(34), low, np.float32(43))
            return result
        step, first = (np.float32(2), One) if self.name == "iq3s" else (np.float32(8), np.float32(4))
        count = np.rint(np.clip(x * (One / step) - np.float32(0.5), Zero, np.float32(7)))
        result = count * step + first
        return result

    @property
    def top(self) -> np.float32:
        """The end of the search for a scale, where a level means 62 as the codebook has it."""
        result: np.float32 = np.float32(self.entries.max())
        return result


CODEBOOKS = {
    "iq2_xxs": Codebook("iq2xxs", True, 32, 8.0),
    "iq2_xs": Codebook("iq2xs", True, 16, 8.0),
    "iq2_s": Codebook("iq2s", False, 16, 8.0),
    "iq3_xxs": Codebook("iq3xxs", True, 32, 4.0),
    "iq3_s": Codebook("iq3s", False, 32, 1.0),
}


def codebook_super_block(values: Floats, importance: Floats | None, book: Codebook) -> Floats:
    """Super-blocks (n, 256)."""
    blocks = blocks_of(values)
    w = block_weights(importance, 256)
    x, signs = _split_signs(blocks.x, w, even=book.even_signs)
    slices = [slice(start, start + book.sub_block) for start in range(0, 256, book.sub_block)]
    parts = [_search(x[:, one], w[one], book) for one in slices]
    unit = np.maximum(np.max(parts, axis=0), Zero) * (One / (np.float32(2) * _MOST + One))
    scales = [
        np.rint(np.clip(part * inverse(unit) * np.float32(0.5) - np.float32(0.5), Zero, _MOST))
        for part in parts
    ]
    xa = aa = np.zeros(len(values), np.float32)
    for j, one in enumerate(slices):
        scales[j], xl, ll = _choose(x[:, one], w[one], book, unit, scales[j])
        odd = scales[j] + scales[j] + One
        xa, aa = xa + odd * xl, aa + odd * odd * ll
    fitted = ratio(xa, aa)
    unit = _stored(blocks, np.where(fitted > 0, fitted, unit), book)
    out = np.empty_like(values)
    for j, one in enumerate(slices):
        entries, _, _ = _entries_of(x[:, one], w[one], book, unit * (scales[j] + scales[j] + One))
        full = blocks.full(unit) * (scales[j] + scales[j] + One)[:, None]
        out[:, one] = full * entries * signs[:, one]
    return out


def _stored(blocks: Blocks, unit: Floats, book: Codebook) -> Floats:
    result: Floats = blocks.as_half(unit * np.float32(book.stored)) * np.float32(1 / book.stored)
    return result


def _split_signs(x: Floats, w: Floats, *, even: bool) -> tuple[Floats, Floats]:
    """Magnitudes and signs; with ``even`` one magnitude of a group of 8 may be negative."""
    signs = np.where(x < 0, -One, One)
    magnitudes = np.abs(x)
    if even:
        groups = magnitudes.reshape(len(x), -1, 8)
        odd = (signs.reshape(groups.shape) < 0).sum(axis=2) % 2 == 1
        place = (w.reshape(1, -1, 8) * groups).argmin(axis=2)
        flip = odd[..., None] & (np.arange(8) == place[..., None])
        magnitudes = np.where(flip, -groups, groups).reshape(x.shape)
        signs = np.where(flip.reshape(x.shape), -signs, signs)
    return magnitudes, signs


def _best_entries(x: Floats, w: Floats, book: Codebook, scale: Floats) -> tuple[Floats, Floats, Floats]:
    """For groups (n, values) at scales (n,): the best entries (n, values) and their sums xl and ll."""
    half = book.entries.shape[1] // 2
    sums = []
    for start in (0, half):
        xl = ll = np.zeros((len(x), len(book.entries)), np.float32)
        for i in range(start, start + half):
            level = book.entries[:, i]
            xl = xl + x[:, i : i + 1] * (w[i] * level)
            ll = ll + level * (w[i] * level)
        sums.append((xl, ll))
    costs = [scale[:, None] * ll - (xl + xl) for xl, ll in sums]
    found = book.order[(costs[0] + costs[1])[:, book.order].argmin(axis=1)]
    each = np.arange(len(x))
    return (
        book.entries[found],
        sums[0][0][each, found] + sums[1][0][each, found],
        sums[0][1][each, found] + sums[1][1][each, found],
    )


def _entries_of(x: Floats, w: Floats, book: Codebook, scale: Floats) -> tuple[Floats, Floats, Floats]:
    """Entries (n, sub_block) and the sums over the groups of a sub-block."""
    values = book.entries.shape[1]
    xl = ll = np.zeros(len(x), np.float32)
    entries = np.empty_like(x)
    for start in range(0, x.shape[1], values):
        one = slice(start, start + values)
        entries[:, one], part_xl, part_ll = _best_entries(x[:, one], w[one], book, scale)
        xl, ll = xl + part_xl, ll + part_ll
    return entries, xl, ll


def _search(x: Floats, w: Floats, book: Codebook) -> Floats:
    """A scale for one sub-block by itself: first without regard to the codebook, then with it around that."""
    ends = [float(np.float32(end) * book.top) for end in ENDS]
    first = ratio(*search_scale(x, w, book.nearest_level, ends, 1))
    best_xl, best_ll = np.zeros(0, np.float32), np.zeros(0, np.float32)
    for factor in FACTORS if len(book.entries) <= 512 else FACTORS[:1]:
        _, xl, ll = _entries_of(x, w, book, first * np.float32(factor))
        if not best_xl.size:
            best_xl, best_ll = xl, ll
            continue
        better = best_xl * best_xl * ll < xl * xl * best_ll
        best_xl, best_ll = np.where(better, xl, best_xl), np.where(better, ll, best_ll)
    return ratio(best_xl, best_ll)


def _choose(x: Floats, w: Floats, book: Codebook, unit: Floats, old: Floats) -> tuple[Floats, Floats, Floats]:
    """The best of scale, scale - 1, scale + 1, and its sums."""
    scale, best = old, np.full_like(unit, 1e30)
    best_xl = best_ll = np.zeros_like(unit)
    for step in (0, -1, 1):
        tried = np.clip(old + np.float32(step), Zero, _MOST)
        full = unit * (tried + tried + One)
        _, xl, ll = _entries_of(x, w, book, full)
        error = full * (full * ll - xl - xl)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
        best_xl, best_ll = np.where(better, xl, best_xl), np.where(better, ll, best_ll)
    return scale, best_xl, best_ll
