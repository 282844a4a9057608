"""Groups: what blocks of every integer encoding are when they are taken apart.

Common ground between the encodings: codes, one scale and one zero point a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


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
    """n groups; value = (code - zero_point) * scale, rounded once to float32."""

    codes: npt.NDArray[np.int16]
    """(n, size)"""
    scales: npt.NDArray[np.float32]
    """(n,)"""
    zero_points: npt.NDArray[np.int16]
    """(n,)"""

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
            )
        count = size // self.size
        bits = self.scales.view(np.uint32).reshape(-1, count)
        points = self.zero_points.reshape(-1, count)
        differs = (bits != bits[:, :1]).any(axis=1) | (points != points[:, :1]).any(axis=1)
        refuse(np.repeat(differs, count), f"its neighbours in a group of {size} have another scale")
        return Groups(self.codes.reshape(-1, size), self.scales[::count].copy(), points[:, 0].copy())

    def check_codes(self, highest: int) -> None:
        """Checks that codes are from 0 to ``highest``.

        Raises:
            DoesNotFit: they are not.
        """
        bad = (self.codes.min(axis=1) < 0) | (self.codes.max(axis=1) > highest)
        refuse(bad, f"its codes do not fit in 0 to {highest}")
