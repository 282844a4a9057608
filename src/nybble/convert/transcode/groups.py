"""Groups: what blocks of every integer encoding are when they are taken apart.

Common ground between the encodings: codes, one scale and one zero point a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

NEGATIVE = "its scale is negative beside a minimum"
"""A zero would get another sign."""


class DoesNotFit(Exception):
    """Raised inside a conversion: which group cannot be held, and why."""

    def __init__(self, groups: npt.NDArray[np.bool_], reason: str) -> None:
        super().__init__(reason)
        self.group = int(np.flatnonzero(groups)[0])
        """Index of the first one."""
        self.reason = reason


def refuse(groups: npt.NDArray[np.bool_], reason: str) -> None:
    """Raises DoesNotFit if any of the groups is marked: bool (n,)."""
    if groups.any():
        raise DoesNotFit(groups, reason)


@dataclass(frozen=True)
class Groups:
    """n groups; value = (code - zero_point) * scale, rounded once to float32, or
    code * scale + minimum, each rounded."""

    codes: npt.NDArray[np.int16]
    """(n, size)"""
    scales: npt.NDArray[np.float32]
    """(n,)"""
    zero_points: npt.NDArray[np.int16]
    """(n,); zeros beside minima"""
    minima: npt.NDArray[np.float32] | None = None
    """(n,), or None where there are zero points."""

    @property
    def size(self) -> int:
        """Elements of a group."""
        return int(self.codes.shape[1])

    def centred(self, middle: int) -> Groups:
        """The same values with one zero point for all."""
        if (self.zero_points == middle).all():
            return self
        shift = np.int16(middle) - self.zero_points
        return replace(
            self, codes=self.codes + shift[:, None], zero_points=np.full_like(self.zero_points, middle)
        )

    def with_zero_points(self) -> Groups:
        """The same values with zero points in place of minima.

        Raises:
            DoesNotFit: a minimum is no whole multiple of its scale, or a zero would get another sign.
        """
        if self.minima is None:
            return self
        wide, below = self.scales.astype(np.float64), 0.0 - self.minima.astype(np.float64)
        refuse(np.signbit(self.scales) | ~np.isfinite(wide + below), NEGATIVE)
        with np.errstate(divide="ignore", invalid="ignore"):
            points = np.rint(below / wide)
        points = np.where(np.isfinite(points) & (np.abs(points) <= 255), points, 0)
        refuse(points * wide != below, "its minimum is not a whole multiple of its scale")
        return Groups(self.codes, self.scales, points.astype(np.int16))

    def with_minima(self) -> Groups:
        """The same values with minima in place of zero points.

        Raises:
            DoesNotFit: a minimum is no float32, or a zero would get another sign.
        """
        if self.minima is not None:
            return self
        below = (self.codes < self.zero_points[:, None]).any(axis=1)
        refuse(np.signbit(self.scales) | ((self.scales == 0) & below), NEGATIVE)
        exact = 0.0 - (self.scales.astype(np.float64) * self.zero_points + 0.0)  # no zero is positive
        with np.errstate(over="ignore"):
            minima = exact.astype(np.float32)
        refuse(minima != exact, "its minimum is not a float32")
        return Groups(self.codes, self.scales, np.zeros_like(self.zero_points), minima)

    def check_products(self) -> None:
        """Checks that codes times scales are exact in float32: then it does not matter where is rounded.

        Raises:
            DoesNotFit: one is not.
        """
        exact = self.codes * self.scales.astype(np.float64)[:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            inexact = (exact.astype(np.float32) != exact).any(axis=1)
        refuse(inexact, "codes times its scale are rounded")

    def of_size(self, size: int) -> Groups:
        """The same values in larger or smaller groups; one size must divide the other.

        Raises:
            DoesNotFit: groups that would share a scale do not have the same one.
        """
        if size == self.size:
            return self
        if self.size % size == 0:
            count = self.size // size
            return Groups(
                self.codes.reshape(-1, size),
                np.repeat(self.scales, count),
                np.repeat(self.zero_points, count),
                None if self.minima is None else np.repeat(self.minima, count),
            )
        count = size // self.size
        bits = self.scales.view(np.uint32).reshape(-1, count)
        points = self.zero_points.reshape(-1, count)
        differs = (bits != bits[:, :1]).any(axis=1) | (points != points[:, :1]).any(axis=1)
        if self.minima is not None:
            lowest = self.minima.view(np.uint32).reshape(-1, count)
            differs |= (lowest != lowest[:, :1]).any(axis=1)
        refuse(np.repeat(differs, count), f"its neighbours in a group of {size} have another scale")
        minima = None if self.minima is None else self.minima[::count].copy()
        return Groups(self.codes.reshape(-1, size), self.scales[::count].copy(), points[:, 0].copy(), minima)

    def check_codes(self, highest: int) -> None:
        """Checks that codes are from 0 to ``highest``.

        Raises:
            DoesNotFit: they are not.
        """
        bad = (self.codes.min(axis=1) < 0) | (self.codes.max(axis=1) > highest)
        refuse(bad, f"its codes do not fit in 0 to {highest}")
