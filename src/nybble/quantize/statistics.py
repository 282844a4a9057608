"""InputStatistics: what calibration saw of the input of a linear.

The sums that quantizers weigh errors with. For a linear with weight W and inputs X (tokens,
in_features), the squared error of its output under a changed weight is the trace of
(W' - W) X^T X (W' - W)^T; importance matrices keep only the diagonal of X^T X, AWQ asks for the mean
of |x|.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class InputStatistics:
    """What calibration saw of the input of one or several linears: X is (tokens, in_features)."""

    tokens: int
    """Rows of X."""
    sum_squares: npt.NDArray[np.float64]
    """(in_features,): sum over tokens of x**2 (importance matrices)."""
    sum_absolute: npt.NDArray[np.float64]
    """(in_features,): sum over tokens of abs(x) (AWQ)."""
    hessian: npt.NDArray[np.float32] | None = None
    """(in_features, in_features): X^T X (GPTQ; AWQ's loss), where it was asked for."""

    @property
    def in_features(self) -> int:
        """Columns of X."""
        return len(self.sum_squares)

    @property
    def mean_squares(self) -> npt.NDArray[np.float32]:
        """(in_features,) float32: mean over tokens of x**2, zeros where no token was seen."""
        return (self.sum_squares / max(self.tokens, 1)).astype(np.float32)

    @property
    def mean_absolute(self) -> npt.NDArray[np.float32]:
        """(in_features,) float32: mean over tokens of abs(x), zeros where no token was seen."""
        return (self.sum_absolute / max(self.tokens, 1)).astype(np.float32)


Statistics = Mapping[str, InputStatistics]
"""Statistics by the canonical name of each linear's weight; linears with the same input share one object."""
