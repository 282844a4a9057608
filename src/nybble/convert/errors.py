"""Errors of values: how far those of one encoding are from those of another, measured in pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class ValueErrors:
    """Differences of values, added up piece by piece in float64."""

    elements: int = 0
    max_error: float = 0.0
    """Largest absolute difference."""
    squared_error: float = 0.0
    """Sum of the squared differences."""
    squared_values: float = 0.0
    """Sum of the squared values that were meant."""

    def add(self, meant: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> None:
        """One more piece. Equal values count as no error, NaN beside NaN too."""
        self.elements += meant.size
        wide = meant.astype(np.float64).reshape(-1)
        self.squared_values += float(np.dot(wide, wide))
        if np.array_equal(meant, got, equal_nan=True):
            return
        difference = np.subtract(got, meant, dtype=np.float64).reshape(-1)
        self.max_error = max(self.max_error, float(np.abs(difference).max(initial=0.0)))
        self.squared_error += float(np.dot(difference, difference))

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
