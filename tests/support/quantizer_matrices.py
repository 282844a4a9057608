"""Small fixed matrices on which quantizers are compared: RandomState's streams do not change with NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import ENCODINGS

Floats = npt.NDArray[np.float32]

MATRICES = ("normal", "tails", "channels", "shifted", "uniform")
SHAPE = (32, 512)


def matrix(kind: str) -> Floats:
    """float32 (32, 512): ``channels`` has columns of different sizes, ``shifted`` a mean that is not 0."""
    random = np.random.RandomState(7)
    values = random.standard_normal(SHAPE)
    if kind == "tails":
        values = random.standard_t(4, SHAPE)
    elif kind == "channels":
        values = values * np.exp(random.standard_normal(SHAPE[1]) * 0.7)
    elif kind == "shifted":
        values = values + 0.8
    elif kind == "uniform":
        values = random.uniform(-1, 1, SHAPE)
    else:
        assert kind == "normal"
    return (values * 0.02).astype(np.float32)


def importance_of(values: Floats) -> Floats:
    """Weights of the columns, some of them a hundred times as large as others."""
    random = np.random.RandomState(11)
    return (random.standard_t(4, values.shape[1]) ** 2 + 0.01).astype(np.float32)


def relative_error(
    values: Floats, name: str, blocks: npt.NDArray[np.uint8], importance: Floats | None
) -> float:
    """sqrt(sum w (x - y)^2 / sum w x^2), in float64."""
    wide = values.astype(np.float64)
    weights = 1.0 if importance is None else importance.astype(np.float64)
    difference = wide - ENCODINGS[name].dequantize(blocks).reshape(values.shape)
    return float(np.sqrt((weights * difference**2).sum() / (weights * wide**2).sum()))
