"""Estimates: a mean, a share or a quantile of many positions, with its standard error.

Positions are taken as independent, as llama.cpp's tools do. Neighbours in a text are not quite, so
that true errors are somewhat larger; a difference of two models on the same positions is what is
known best, which is why there are paired estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, in the same unit."""

    value: float
    error: float

    def to_json(self) -> dict[str, float | None]:
        """As an object; JSON has no infinity."""
        return {
            name: value if math.isfinite(value) else None
            for name, value in (("value", self.value), ("error", self.error))
        }


def mean(values: Floats) -> Estimate:
    """The mean; its error is the sample's standard deviation over the root of the count."""
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0
    return Estimate(float(values.mean()), error)


def share(part: int, count: int) -> Estimate:
    """A proportion; the error is that of the binomial distribution."""
    value = part / count
    return Estimate(value, math.sqrt(value * (1 - value) / max(1, count - 1)))


def exponential(of: Estimate) -> Estimate:
    """e to the power of an estimate: perplexity from a mean negative log-likelihood.

    Infinite where a float cannot hold it, as of a model that is broken altogether.
    """
    try:
        value = math.exp(of.value)
    except OverflowError:
        return Estimate(math.inf, math.inf)
    return Estimate(value, value * of.error)


def quantile(values: Floats, q: float) -> Estimate:
    """A quantile, interpolated linearly.

    The error is half the distance of the order statistics one binomial standard deviation below and
    above the quantile's rank; it needs no assumption about the distribution (H. A. David, H. N. Nagaraja,
    "Order Statistics", section 7.1).
    """
    ordered = np.sort(values)
    count = len(ordered)
    spread = math.sqrt(q * (1 - q) / count)
    low, high = np.quantile(ordered, [max(0.0, q - spread), min(1.0, q + spread)])
    return Estimate(float(np.quantile(ordered, q)), float(high - low) / 2)
