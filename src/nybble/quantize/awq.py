"""AWQ: input features that carry large activations are scaled up in the weights before rounding.

Rounding errors of a group are about as large for every weight in it. Multiplying the columns of the few
features with large activations, and dividing the activations (``folding.py`` says in whose weights),
makes the errors smaller where they count. For a group of linears with one input X:

    s = mean(|X|) ** ratio, divided by sqrt(max s * min s)       ratio = 0, 1/20, ... 19/20
    the ratio with the smallest squared error of X (Q(W s) / s - W)^T is taken; 0 is no scaling

and then for each group of codes of each row the share of its largest value that the range is cut to,
1, 0.95, ... 0.55, by the same error (``search_clipping``). ``Q`` may be any rounding, so that scales can be
searched for GGUF's types too.

The error is computed from X^T X rather than from kept tokens: tr(D H D^T), exact for all of the
calibration text. What makes it cheap is to look at some rows of each matrix only (``rows``): all rows
share the scales. A sample of tokens would have to be large, for a matrix of 3072 columns fits 512 tokens
too well.

Feedback (``gptq.py``) or another rounding may follow: ``scaled`` gives the statistics of the divided
inputs.

Source: arXiv:2306.00978, sections 3.2 and A, and https://github.com/mit-han-lab/llm-awq (auto_scale.py,
auto_clip.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.quantize.rtn import checked_columns, round_rtn
from nybble.quantize.statistics import InputStatistics

Floats = npt.NDArray[np.float32]
Round = Callable[[Floats], Floats]
"""What the values (rows, in_features) become: rounded and back, float32 of the same shape."""

GRID = 20
"""Ratios, and steps from 1 to 0 of the clipping's shares."""
MOST_CLIPPING = 0.5
ROWS, LEAST_ROWS, ROWS_UP_TO = 512, 128, 4096
"""Rows of each matrix that the search for scales looks at; fewer, down to the second, where there are more
columns than the third: the work grows with rows * columns ** 2."""
_CHUNK = 1 << 22  # elements of a matrix that clipping works on at a time


@dataclass(frozen=True)
class AwqScales:
    """The scales of a group of linears."""

    scales: Floats
    """One for each element or row of what comes before: (ScaleGroup.scales,)."""
    ratio: float
    """The ratio that was best; 0: scales are all 1."""
    loss: float
    """Squared error of the outputs, summed over the rows and the text that were looked at."""
    loss_unscaled: float
    """The same without scales."""


def search_scales(
    weights: Sequence[Floats],
    statistics: InputStatistics,
    round_values: Round,
    *,
    source: npt.NDArray[np.int64] | None = None,
    grid: int = GRID,
    rows: int | None = None,
) -> AwqScales:
    """The best scales for linears that have one input.

    Args:
        weights: (out_features, in_features) float32 each.
        statistics: of their input, with the Hessian.
        round_values: the rounding that is to follow.
        source: which scale each input feature takes (``ScaleGroup.source``); None: each its own.
        grid: how many ratios are tried.
        rows: rows of each matrix that are looked at, evenly spread; None: ``rows_looked_at``.

    Raises:
        ValueError: shapes that do not fit, statistics without a Hessian or without tokens.
    """
    hessian = _hessian(statistics)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != len(hessian):
            raise ValueError(f"a matrix of shape {weight.shape} for {len(hessian)} input features")
    if not weights or grid < 1:
        raise ValueError("no matrices, or no ratios to try")
    source = np.arange(len(hessian)) if source is None else source
    sizes = _shared(statistics.sum_absolute, source)
    count = rows_looked_at(len(hessian)) if rows is None else rows
    looked_at = np.concatenate([weight[_spread(len(weight), count)] for weight in weights])
    best: AwqScales | None = None
    unscaled = 0.0
    for step in range(grid):
        ratio = step / grid
        scales = _scales(sizes, ratio)
        columns = scales[source]
        difference = round_values(looked_at * columns) / columns - looked_at
        loss = float(np.vdot(difference @ hessian, difference))
        if step == 0:
            unscaled = loss
        if best is None or loss < best.loss:
            best = AwqScales(scales, ratio, loss, unscaled)
    assert best is not None
    return best


def search_clipping(
    weight: Floats,
    statistics: InputStatistics,
    form: AffineFormat,
    *,
    grid: int = GRID,
    most: float = MOST_CLIPPING,
    threads: int | None = None,
) -> Floats:
    """The matrix with the largest values of each group cut to where rounding them costs least.

    The authors leave q and k as they are, for their product is sensitive: that is for the caller to do.

    Args:
        weight: (out_features, in_features) float32, scaled already.
        statistics: of its input, divided by the scales already, with the Hessian.
        form: the encoding that follows, by ``quantize_rtn`` without a search.
        grid: shares of the largest value that make up 1.
        most: the largest share that is cut off.
        threads: at most, apart from BLAS; None: the cores that this process may use.

    Returns:
        float32 in the shape of ``weight``.

    Raises:
        ValueError: shapes that do not fit, statistics without a Hessian or without tokens.
    """
    columns = checked_columns(weight, form)
    hessian = _hessian(statistics)
    if len(hessian) != columns:
        raise ValueError(f"statistics of {len(hessian)} input features for a matrix of {columns} columns")
    size = form.group_size
    groups = columns // size
    own = np.stack([hessian[at : at + size, at : at + size] for at in range(0, columns, size)])
    clipped = np.empty_like(weight)
    step = max(1, _CHUNK // columns)
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        values = part.reshape(len(part), groups, size)
        largest = np.abs(values).max(axis=2, keepdims=True)
        best, best_loss = part.copy(), np.full((len(part), groups), np.inf, np.float32)
        for cut in range(int(most * grid)):
            limit = largest * np.float32(1 - cut / grid)
            limited = np.clip(values, -limit, limit).reshape(part.shape)
            difference = round_rtn(limited, form, clipping=False, threads=threads) - part
            loss = _group_losses(difference.reshape(values.shape), own)
            better = loss < best_loss
            best_loss = np.where(better, loss, best_loss)
            np.copyto(best.reshape(values.shape), limited.reshape(values.shape), where=better[..., None])
        clipped[start : start + step] = best
    return clipped


def scaled(statistics: InputStatistics, columns: Floats) -> InputStatistics:
    """The statistics of inputs that are divided, feature i by ``columns[i]`` (in_features,)."""
    divisors = columns.astype(np.float64)
    hessian = statistics.hessian
    if hessian is not None:
        hessian = hessian / columns[:, None] / columns
    return InputStatistics(
        tokens=statistics.tokens,
        sum_squares=statistics.sum_squares / divisors**2,
        sum_absolute=statistics.sum_absolute / divisors,
        hessian=hessian,
    )


def _group_losses(differences: Floats, hessians: Floats) -> Floats:
    """d H d^T of each group: differences (rows, groups, size), hessians (groups, size, size)."""
    losses = np.empty(differences.shape[:2], np.float32)
    for group, hessian in enumerate(hessians):
        own = np.ascontiguousarray(differences[:, group])
        losses[:, group] = np.einsum("ij,ij->i", own @ hessian, own)
    return losses


def _hessian(statistics: InputStatistics) -> Floats:
    if statistics.hessian is None:
        raise ValueError("AWQ measures errors with X^T X: collect the statistics with hessian=True")
    if statistics.tokens == 0:
        raise ValueError("the statistics saw no tokens")
    return statistics.hessian


def _shared(sum_absolute: npt.NDArray[np.float64], source: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The mean of |x| (up to a factor) for each scale; features that were never seen count as the
    smallest that were, for another text may have them.
    """
    if source.shape != sum_absolute.shape:
        raise ValueError(f"{source.shape} sources for {sum_absolute.shape} input features")
    sizes: npt.NDArray[np.float64] = np.bincount(source, sum_absolute) / np.bincount(source)
    if not np.isfinite(sizes).all() or sizes.min() < 0:
        raise ValueError("sums of |x| must be finite and not negative, and every scale used")
    seen = sizes[sizes > 0]
    return np.maximum(sizes, seen.min()) if seen.size else np.ones_like(sizes)


def _scales(sizes: npt.NDArray[np.float64], ratio: float) -> Floats:
    """sizes ** ratio around 1, computed by logarithms so that nothing overflows."""
    logarithms = ratio * np.log(sizes)
    middle = (logarithms.max() + logarithms.min()) / 2
    scales: Floats = np.exp(logarithms - middle).astype(np.float32)
    return scales


def rows_looked_at(columns: int) -> int:
    """Rows of each matrix of so many columns that the search for scales looks at."""
    return max(LEAST_ROWS, min(ROWS, ROWS * ROWS_UP_TO**2 // columns**2))


def _spread(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """Evenly spread indices of at most ``wanted`` rows."""
    if wanted >= count:
        return np.arange(count)
    return np.arange(wanted) * count // wanted
