"""Random LoRA adapters for the tiny checkpoints, made with NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nybble.checkpoint.adapter import EMBEDDING, Adapter, LoraPair
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from support.random_checkpoints import shapes


def random_adapter(
    config: ModelConfig,
    name: str = "adapter",
    *,
    only: Sequence[str] = ("proj.weight",),
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    kind: str = "f32",
) -> Adapter:
    """An adapter of every weight whose name ends with one of ``only``; its changes are about as large."""
    random = np.random.default_rng(seed)
    pairs: dict[str, LoraPair] = {}
    for weight, shape in shapes(config).items():
        if not weight.endswith(tuple(only)):
            continue
        rows, columns = shape[::-1] if weight == EMBEDDING else shape
        a = matrix(random, f"{weight}.A", (rank, columns), kind, columns**-0.5)
        b = matrix(random, f"{weight}.B", (rows, rank), kind, rank**-0.5 * 0.5)
        pairs[weight] = LoraPair(a, b, alpha / rank)
    assert pairs
    return Adapter(name, pairs, interleaved=config.rope.interleaved)


def matrix(
    random: np.random.Generator, name: str, shape: tuple[int, int], kind: str, deviation: float
) -> Tensor:
    """A random matrix in an encoding."""
    row = encoding(kind)
    assert row.quantize is not None
    values = (random.standard_normal(shape) * deviation).astype(np.float32)
    return Tensor(name, shape, row, row.quantize(values.reshape(-1)))
