"""Errors of values: how far those of one encoding are from those of another, measured in pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ValueErrors:
    """Differences of some values. Those of several pieces are added with ``+``, always in the same order,
    so that the same values give the same sums."""

    elements: int = 0
    max_error: float = 0.0
    """Largest absolute difference."""
    squared_error: float = 0.0
    """Sum of the squared differences."""
    squared_values: float = 0.0
    """Sum of the squared values that were meant."""

    @classmethod
    def of(cls, meant: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> ValueErrors:
        """The differences of one piece. NaN beside NaN counts as equal."""
        meant, got = meant.reshape(-1), got.reshape(-1)
        if not meant.size:
            return cls()
        # Products are added in pairs, in float32: no machine's vector length can be seen in the sum.
        squares = float(np.sum(meant * meant))
        difference = np.subtract(got, meant)
        largest = max(float(difference.max()), -float(difference.min()))
        if largest == 0.0 or (math.isnan(largest) and np.array_equal(meant, got, equal_nan=True)):
            return cls(meant.size, 0.0, 0.0, squares)
        np.multiply(difference, difference, out=difference)
        return cls(meant.size, largest, float(np.sum(difference)), squares)

    def __add__(self, other: ValueErrors) -> ValueErrors:
        return ValueErrors(
            self.elements + other.elements,
            max(self.max_error, other.max_error),
            self.squared_error + other.squared_error,
            self.squared_values + other.squared_values,
        )

    @property
    def exact(self) -> bool:
        """Whether every value is what it was."""
        return self.max_error == 0.0

    @property
    def rms_error(self) -> float:
        """Root of the mean squared difference."""
        return math.sqrt(self.squared_error / self.elements) if self.elements else 0.0

    @property
    def relative_error(self) -> float:
        """Root of the squared differences over that of the values; 0 where nothing differs."""
        if self.squared_error == 0.0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_values) if self.squared_values else math.inf
