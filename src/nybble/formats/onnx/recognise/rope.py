"""Rotary tables back to a RopeConfig: theta and scaling are guessed and checked against every table.

Tables hold cos and sin of position * inverse frequency. The inverse frequencies are measured from
many rows; then known kinds of scaling are tried, and the first whose own cos and sin equal the
tables is taken. Where none fits, the measured frequencies themselves are kept as divisors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.config import RopeConfig
from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise.values import Array
from nybble.graph.rotary import rotary_frequencies

Floats = npt.NDArray[np.float64]

THETAS = (
    10_000.0, 500_000.0, 1_000_000.0, 100_000.0, 130_000.0, 5_000_000.0, 2_000_000.0, 10_000_000.0, 250_000.0,
    50_000.0, 25_000.0, 1_500_000.0, 160_000.0, 8_000_000.0,
)  # fmt: skip
ORIGINALS = (8192, 4096, 2048, 32768, 16384, 65536, 131072, 1024, 512)
ANGLE_ERROR = 4e-7
"""Relative error of an angle that was computed in float32."""


@dataclass(frozen=True)
class Rows:
    """cos and sin of some positions: (n), (n, rotary_dim / 2) each."""

    positions: Floats
    cos: Floats
    sin: Floats
    precision: float
    """Rounding error of the stored numbers."""

    @property
    def rotary_dim(self) -> int:
        """Features that are rotated."""
        return 2 * int(self.cos.shape[1])


def rows_of(cos: Array, sin: Array, first: int, positions: Iterable[int]) -> Rows:
    """The rows of those positions that the tables have; ``first`` is the position of row 0."""
    found = [p for p in positions if p > 0 and 0 <= p - first < len(cos)]
    if not found:
        raise UnsupportedError("the rotary tables have no row of a position above 0")
    index = [p - first for p in found]
    chosen = np.asarray(cos[index], np.float64), np.asarray(sin[index], np.float64)
    if not (np.isfinite(chosen[0]).all() and np.isfinite(chosen[1]).all()):
        raise UnsupportedError("the rotary tables hold numbers that are not finite")
    with np.errstate(over="ignore"):
        return Rows(np.asarray(found, np.float64), *chosen, _precision(chosen))


def _precision(chosen: tuple[Floats, ...]) -> float:
    """Rounding error of numbers, by the narrowest type that holds them all."""
    halves = all(np.array_equal(part, part.astype(np.float16).astype(np.float64)) for part in chosen)
    brains = all(np.array_equal(part, _bf16(part)) for part in chosen)
    return 2.0**-9 if brains else 2.0**-11 if halves else 2.0**-22


def _bf16(values: Floats) -> Floats:
    bits = values.astype(np.float32).view(np.uint32)
    return np.asarray((bits & np.uint32(0xFFFF0000)).view(np.float32), np.float64)


SAMPLED = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2047)
SAMPLED_FAR = tuple(2**power - 1 for power in range(12, 21))


def measured(rows: Rows) -> tuple[Floats, float]:
    """Inverse frequencies (rotary_dim / 2) and the factor on cos and sin."""
    sizes = np.sort(np.hypot(rows.cos, rows.sin), axis=None)
    factor = float(sizes[sizes.size // 2])
    if (
        not 0.01 < factor < 100
        or np.abs(np.hypot(rows.cos, rows.sin) - factor).max() > 8 * rows.precision * factor
    ):
        raise UnsupportedError("the rotary tables are no cos and sin of one angle")
    factor = 1.0 if abs(factor - 1) < 2 * rows.precision else factor
    angles = np.arctan2(rows.sin, rows.cos)
    first = int(rows.positions[0])
    found = np.asarray(angles[0] / first)
    for at in range(1, len(rows.positions)):
        position = float(rows.positions[at])
        # The angle is known up to whole turns; what is known so far says how many.
        away = angles[at] - position * found
        away -= 2 * math.pi * np.rint(away / (2 * math.pi))
        sure = np.abs(away) < 0.5
        found = np.where(sure, found + away / position, found)
    return found, factor


def fits(rope: RopeConfig, rows: Rows, length: int) -> bool:
    """Whether the config's cos and sin equal the tables, as far as their precision goes."""
    try:
        frequencies, factor = rotary_frequencies(rope, length)
    except Exception:  # a guess that makes no sense
        return False
    angles = rows.positions[:, None] * frequencies.astype(np.float64)
    allowed = (4 * rows.precision + 1e-6 + ANGLE_ERROR * angles) * max(1.0, factor)
    return bool(
        (np.abs(np.cos(angles) * factor - rows.cos) <= allowed).all()
        and (np.abs(np.sin(angles) * factor - rows.sin) <= allowed).all()
    )


def recover(rows: Rows, hints: Iterable[RopeConfig] = ()) -> RopeConfig:
    """The config whose tables these are.

    ``hints`` are tried first: what a config.json beside the model says. Without a fit the config has
    ``frequency_factors``, which is exact as far as the tables are.
    """
    inverse, factor = measured(rows)
    dim = rows.rotary_dim
    attention = None if factor == 1.0 else neat(factor, 1e-6)
    # These do not change with the length, whatever a config beside the model says.
    hints = [rope for rope in hints if rope.kind not in ("longrope", "dynamic")]
    for rope in (*hints, *_candidates(inverse, dim)):
        for candidate in (rope, replace(rope, attention_factor=attention)):
            if candidate.rotary_dim == dim and fits(candidate, rows, 1):
                return candidate
    base = 10_000.0
    exponents = np.arange(0, dim, 2) / dim
    if not (inverse > 0).all():
        raise UnsupportedError("the rotary tables turn some features backwards or not at all")
    divisors = tuple(float(value) for value in base**-exponents / inverse)
    rope = RopeConfig(theta=base, rotary_dim=dim, frequency_factors=divisors, attention_factor=attention)
    if not fits(rope, rows, 1):
        raise UnsupportedError("the rotary tables are no cos and sin of position times a frequency")
    return rope


def _thetas(inverse: Floats, dim: int, at: Iterable[int]) -> Iterator[float]:
    """Guesses of theta from single frequencies, the neatest first."""
    yield from THETAS
    for place in at:
        if 0 < place < len(inverse) and 0 < inverse[place] < 1:
            exact = inverse[place] ** (-dim / (2 * place))
            for digits in (1, 2, 3, 4, 5, 6, 8):
                yield float(f"{exact:.{digits}g}")
            yield float(exact)


def _candidates(inverse: Floats, dim: int) -> Iterator[RopeConfig]:
    half = dim // 2
    for theta in _thetas(inverse, dim, (half - 1, half // 2, 1)):
        yield RopeConfig(theta=theta, rotary_dim=dim)
    if 0 < inverse[0] < 0.95:
        for theta in _thetas(inverse / inverse[0], dim, (half - 1, half // 2, 1)):
            yield RopeConfig(theta=theta, rotary_dim=dim, kind="linear", factor=neat(1 / inverse[0], 2e-3))
    if half > 2:
        for theta in _thetas(inverse, dim, (1, 2, 3)):
            stretch = theta ** (-(dim - 2) / dim) / inverse[-1]
            if not 1.05 < stretch < 1000:
                continue
            for original in ORIGINALS:
                for low, high in ((1.0, 4.0), (1.0, 32.0), (1.0, 8.0)):
                    yield RopeConfig(
                        theta=theta, rotary_dim=dim, kind="llama3", factor=neat(stretch, 5e-3),
                        low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original,
                    )  # fmt: skip


def recover_longrope(
    short: Rows, long: Rows, original: int, maximum: int, hints: Iterable[RopeConfig] = ()
) -> RopeConfig:
    """LongRoPE from its two tables; ``original`` is the longest sequence that uses the short ones.

    Only theta times the divisors shows in the tables: theta is taken as 10000, which is Phi-3's.
    """
    inverse_short, factor = measured(short)
    inverse_long, factor_long = measured(long)
    if abs(factor - factor_long) > 8 * (short.precision + long.precision):
        raise UnsupportedError("the two rotary tables have different factors")
    dim, theta = short.rotary_dim, 10_000.0
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    if long.rotary_dim != dim or not ((inverse_short > 0).all() and (inverse_long > 0).all()):
        raise UnsupportedError("the two rotary tables do not fit each other")
    growth = max(1.0, maximum / original)
    rope = RopeConfig(
        theta=theta,
        rotary_dim=dim,
        kind="longrope",
        factor=growth,
        original_max_position_embeddings=original,
    )
    for hint in hints:
        if (hint.kind, hint.rotary_dim, hint.original_max_position_embeddings) == ("longrope", dim, original):
            for attention in (hint.attention_factor, neat(factor, 1e-6)):
                candidate = replace(hint, attention_factor=attention)
                if fits(candidate, short, 1) and fits(candidate, long, original + 1):
                    return candidate
    for digits in (2, 3, 4, 6, 15):
        shorts = tuple(round(float(value), digits) for value in plain / inverse_short)
        longs = tuple(round(float(value), digits) for value in plain / inverse_long)
        for attention in (None, neat(factor, 1e-6)):
            candidate = replace(rope, short_factor=shorts, long_factor=longs, attention_factor=attention)
            if min(*shorts, *longs) > 0 and fits(candidate, short, 1) and fits(candidate, long, original + 1):
                return candidate
    raise UnsupportedError("the rotary tables are no cos and sin of position times a frequency")


def neat(value: float, tolerance: float) -> float:
    """The shortest number within a relative tolerance."""
    for digits in range(1, 17):
        short = float(f"{value:.{digits}g}")
        if math.isclose(short, value, rel_tol=tolerance):
            return short
    return value
