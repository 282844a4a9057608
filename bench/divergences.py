"""KL divergences of each token from an original whose logits lie in files, for comparisons in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.evaluate.estimates import mean, quantile
from nybble.evaluate.measures import measure

Floats = npt.NDArray[np.float32]


@dataclass
class Divergences:
    """Of one model, one entry a token; all models of a comparison have the same tokens."""

    kld: npt.NDArray[np.float64]
    """KL(original || model), nats."""
    same_best: npt.NDArray[np.bool_]
    """Whether the original's most probable token is the model's."""

    def to_json(self) -> dict[str, float]:
        average = mean(self.kld)
        return {
            "mean": average.value,
            "standard_error": average.error,
            "p99": quantile(self.kld, 0.99).value,
            "same_best": float(self.same_best.mean()),
        }


def divergences_of(originals: Sequence[Path], logits: Iterable[Floats], threads: int) -> Divergences:
    """From a model's logits and the files of the original's: float32 (tokens, vocab_size), one a window."""
    parts = []
    for file, found in zip(originals, logits, strict=True):
        original = np.load(file, mmap_mode="r")
        nothing = [0] * len(original)  # which token really follows does not matter here
        parts.append(measure(original, [found], nothing, threads=threads)[1])
    return Divergences(
        np.concatenate([rows.kld for rows in parts]),
        np.concatenate([rows.best == rows.reference_best for rows in parts]),
    )
