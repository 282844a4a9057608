"""What two models think of the same tokens: log-likelihood, KL divergence, and the most probable token.

Everything is computed in float64 from float32 logits, a few rows at a time, so that scratch memory stays
within a core's cache whatever the vocabulary, in several threads (NumPy lets go of the interpreter).

With logits x of the reference and y of another, both shifted by their maximum::

    Z(x) = sum(exp(x))          -log p(target) = log Z(x) - x[target]
    KL(p || q) = sum(p log(p / q)) = sum(exp(x) (x - y)) / Z(x) - log Z(x) + log Z(y)

in nats. Source: S. Kullback, R. A. Leibler, "On Information and Sufficiency" (1951).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK_ELEMENTS = 1 << 17  # float64 of them, twice or thrice, fit the second-level cache

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """One model's measures of some rows, one entry a row."""

    nll: Floats
    """Negative log-likelihood of the target, nats."""
    kld: Floats
    """KL divergence from the reference, nats; 0 for the reference itself."""
    best: Ids
    """The most probable token; of several the one with the smallest id."""
    best_probability: Floats
    """Its probability."""
    reference_best: Ids
    """The reference's most probable token."""
    reference_best_probability: Floats
    """Its probability in this model."""
    best_in_reference: Floats
    """Probability of ``best`` in the reference."""
    reference_best_in_reference: Floats
    """Probability of ``reference_best`` in the reference."""

    @staticmethod
    def empty(count: int) -> Rows:
        """Room for ``count`` rows."""
        tokens = ("best", "reference_best")
        room: dict[str, Any] = {
            f.name: np.empty(count, np.int64 if f.name in tokens else np.float64) for f in fields(Rows)
        }
        return Rows(**room)


def measure(
    reference: Logits, others: Sequence[Logits], targets: Sequence[int], *, threads: int | None = None
) -> list[Rows]:
    """The measures of the reference and of each other model, in this order.

    Args:
        reference: finite logits, float32 (rows, vocab_size).
        others: logits of the same shape.
        targets: the token that really follows, one a row.
        threads: how many compute; None: the cores that this process may use.

    Raises:
        ValueError: shapes differ.
    """
    from nybble import _core

    rows, vocabulary = reference.shape
    if any(other.shape != reference.shape for other in others) or len(targets) != rows:
        raise ValueError(
            f"logits {[x.shape for x in (reference, *others)]} and {len(targets)} targets do not fit"
        )
    wanted = np.asarray(targets, np.int64)
    result = [Rows.empty(rows) for _ in range(1 + len(others))]
    size = max(1, _BLOCK_ELEMENTS // vocabulary)

    def work(start: int) -> None:
        part = slice(start, start + size)
        _measure_block(
            reference[part], [other[part] for other in others], wanted[part], [_cut(r, part) for r in result]
        )

    count = min(threads or _core.default_threads(), -(-rows // size))
    if count <= 1:
        for start in range(0, rows, size):
            work(start)
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(0, rows, size)))
    return result


def log_likelihoods(logits: Logits, targets: Sequence[int]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Log-probability of each row's target in nats, and whether it is the row's most probable token."""
    (rows,) = measure(logits, [], targets)
    return -rows.nll, rows.best == np.asarray(targets)


def _cut(rows: Rows, part: slice) -> Rows:
    return Rows(**{f.name: getattr(rows, f.name)[part] for f in fields(Rows)})


def _measure_block(reference: Logits, others: Sequence[Logits], targets: Ids, out: Sequence[Rows]) -> None:
    """Fill ``out``, whose first entry is the reference's."""
    row = np.arange(len(targets))
    x, exp_x, sum_x = _shifted(reference)
    log_x = np.log(sum_x)
    best = reference.argmax(axis=1)
    highest = exp_x[row, best] / sum_x
    own = out[0]
    own.nll[:] = log_x - x[row, targets]
    own.kld[:] = 0.0
    own.best[:] = own.reference_best[:] = best
    own.best_probability[:] = own.reference_best_probability[:] = highest
    own.best_in_reference[:] = own.reference_best_in_reference[:] = highest
    for logits, found in zip(others, out[1:], strict=True):
        y, exp_y, sum_y = _shifted(logits)
        log_y = np.log(sum_y)
        found.nll[:] = log_y - y[row, targets]
        found.best[:] = logits.argmax(axis=1)
        found.best_probability[:] = exp_y[row, found.best] / sum_y
        found.reference_best[:] = best
        found.reference_best_probability[:] = exp_y[row, best] / sum_y
        found.best_in_reference[:] = exp_x[row, found.best] / sum_x
        found.reference_best_in_reference[:] = highest
        np.subtract(x, y, out=y)
        divergence = np.einsum("ij,ij->i", exp_x, y) / sum_x - log_x + log_y
        np.maximum(divergence, 0.0, out=found.kld)  # rounding leaves -1e-16 where both are alike


def _shifted(logits: Logits) -> tuple[Floats, Floats, Floats]:
    """Logits minus their maximum, their exponentials, and the sums of those."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    exponentials = np.exp(x)
    return x, exponentials, exponentials.sum(axis=1)
