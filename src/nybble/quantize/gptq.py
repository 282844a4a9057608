"""GPTQ: columns are rounded one after another, and the later ones make up for what each one lost.

The error that counts is that of the linear's output over the calibration text, tr(D H D^T) with
D = W' - W and H = X^T X. After a column is rounded, the best change of those that are left follows from
H^-1 alone, the same for every row; ``gptq_reference.py`` states the loop. Here it runs in blocks:

    for each block of columns:
        values  = W - errors of all columns before @ U        (BLAS: nearly all of the work)
        rounding with feedback inside the block               (native core: 16 rows in lanes)

Options, and what the paper calls them:

- ``damping``: this share of the mean diagonal is added to H's diagonal (percdamp). Where H is so far
  from positive that this does not do, ten times as much is taken; the factor says how much it was.
- ``act_order`` (desc_act): columns with the largest inputs are rounded first, when most columns are left
  to make up for them. Groups are then made of columns in that order, so the result has a permutation of
  its inputs (``X.input_permutation``), unless
- ``static_groups``: groups are neighbours as always, and their scales are found before anything is
  rounded: no permutation is needed. Without it a group's scales are found when its first column is
  reached, from the values as they are by then.
- ``clipping``: scales by a search for the smallest squared error, in which each column counts as
  1 / U[j, j]^2: what an error of that column costs after the later ones made up for it.

Input features that calibration never saw (zeros in H's diagonal) are rounded as they are: nothing is fed
into or out of them, and they have next to no say in their group's scale. (The authors' code sets such
weights to zero.)

The calibration text should hold some hundred windows of a single token: every token attends to a window's
first one, whose inputs are unlike all others, and as one token in hundreds it would bear the errors of all.

Source: arXiv:2210.17323; the inverse by OBQ, arXiv:2208.11580; act-order and static groups are in
https://github.com/IST-DASLab/gptq.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts, join, scale_values
from nybble.checkpoint.encodings.base import Encoding
from nybble.quantize.inverse_factor import inverse_factor
from nybble.quantize.row_threads import over_rows
from nybble.quantize.rtn import checked_columns, column_weights, search_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 128
"""Columns that are rounded between two matrix products, as in the paper."""
DAMPING = 0.05
"""The paper has 0.01, with 262,144 tokens. With tens of thousands the correlations that were seen are in part
chance, and errors on other text are smaller with more."""
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class GptqFactor:
    """What GPTQ needs to know of the inputs: made once for all linears that share them."""

    upper: Floats
    """(in_features, in_features): U with U^T U = (H + damping)^-1, in the order of rounding."""
    order: npt.NDArray[np.int64] | None
    """(in_features,): the input feature that is rounded i-th; None: as they are."""
    damping: float
    """What was added to the diagonal, as a share of its mean."""
    unseen: int
    """Input features that are zero in all of the calibration text."""

    @property
    def importance(self) -> Floats:
        """(in_features,), in the order of rounding: what a squared error of that column costs."""
        diagonal = np.diagonal(self.upper).astype(np.float64)
        return (1.0 / diagonal**2).astype(np.float32)


@dataclass(frozen=True)
class GptqResult:
    """A matrix rounded with feedback."""

    data: Bytes
    """flat uint8, the encoded rows one after another."""
    permutation: npt.NDArray[np.int32] | None
    """(in_features,): the input feature that each column takes; None: column i takes feature i."""
    loss: float
    """tr(D H D^T) with the damped H: the squared error of the linear's output over the text."""


def factorize(
    hessian: npt.NDArray[np.floating], *, damping: float = DAMPING, act_order: bool = False
) -> GptqFactor:
    """The factor of the inverse of X^T X.

    Args:
        hessian: (in_features, in_features) X^T X, symmetric.
        damping: share of the mean diagonal that is added to the diagonal, above 0.
        act_order: order columns by falling diagonal.

    Raises:
        ValueError: no symmetric matrix of finite numbers, or one that is not positive however damped.
    """
    size = len(hessian)
    if hessian.ndim != 2 or hessian.shape != (size, size) or size == 0:
        raise ValueError(f"X^T X has shape {hessian.shape}; a square matrix is needed")
    if damping <= 0:
        raise ValueError(f"damping is {damping}; it must be above 0, for X^T X may have no inverse")
    diagonal = np.diagonal(hessian).astype(np.float64)
    if not np.isfinite(hessian).all() or diagonal.min() < 0:
        raise ValueError("X^T X must be finite, and its diagonal not negative")
    mean = float(diagonal.mean()) or 1.0
    order = np.argsort(-diagonal, kind="stable") if act_order else None
    share = damping
    while True:
        damped = (
            hessian.astype(np.float64) if order is None else hessian[np.ix_(order, order)].astype(np.float64)
        )
        damped /= mean
        damped.flat[:: size + 1] += share
        try:
            upper = inverse_factor(damped)
            break
        except np.linalg.LinAlgError:
            if share >= MOST_DAMPING:
                raise ValueError("X^T X is not positive, even with its mean diagonal added") from None
            share = min(10 * share, MOST_DAMPING)
    upper /= np.sqrt(mean)
    return GptqFactor(upper.astype(np.float32), order, share, int((diagonal == 0).sum()))


def quantize_gptq(
    weight: Floats,
    factor: GptqFactor,
    form: AffineFormat,
    *,
    static_groups: bool = False,
    clipping: bool = True,
    block: int = BLOCK,
    threads: int | None = None,
) -> GptqResult:
    """The matrix rounded to an affine encoding with error feedback.

    Args:
        weight: (out_features, in_features) float32, finite.
        factor: of the inputs of this linear; with an order, columns are rounded in it.
        form: the encoding; a group may be the whole row.
        static_groups: find all scales first, so that an order needs no permutation.
        clipping: search for each scale; otherwise the extreme values get the outermost codes.
        block: columns between two matrix products.
        threads: at most, apart from BLAS; None: the cores that this process may use.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a scale that does not fit its
            type.
    """
    columns = checked_columns(weight, form)
    _check_factor(factor, columns)
    if block < 1:
        raise ValueError(f"a block of {block} columns; at least 1 is needed")
    order = factor.order
    # A group that is the whole row has its scales before anything is rounded in any case.
    static = static_groups or form.group_size == columns
    rows, size = len(weight), form.group_size
    grids = _Grids(form, rows, columns // size, clipping, threads)
    group_of = np.arange(columns) // size
    importance = factor.importance
    values = weight
    if order is not None:
        values = weight[:, order]
        if static:
            group_of = order // size
            importance = importance[_reverse(order)]
    if static:
        for group in range(columns // size):
            own = slice(group * size, group * size + size)
            grids.find(group, weight[:, own], importance[own])
    span = _span(size, block, static)
    found_on_the_way = None if static else importance
    codes, loss = _run(values, factor.upper, grids, group_of, span, importance=found_on_the_way)
    if static and order is not None:
        codes = np.ascontiguousarray(codes[:, _reverse(order)])
    permutation = None if static or order is None else order.astype(np.int32)
    return GptqResult(join(AffineParts(codes, grids.stored, grids.points), form), permutation, loss)


def quantize_blocks_gptq(
    weight: Floats,
    factor: GptqFactor,
    encoding: Encoding,
    quantize: Callable[[Floats, Floats], Bytes],
    *,
    block: int = BLOCK,
) -> GptqResult:
    """The matrix rounded to any encoding of blocks, each block's error fed into the later ones.

    The columns of one block are rounded together, by ``quantize``, and do not make up for each other:
    less is gained than with an affine encoding, the less the larger the block is.

    Args:
        weight: (out_features, in_features) float32, finite.
        factor: of the inputs of this linear, without an order.
        encoding: what ``quantize`` makes.
        quantize: given float32 (rows, block_size) and what a squared error counts in each of these
            columns (block_size,), the rows' encoded blocks: flat uint8.
        block: columns between two matrix products.

    Raises:
        ValueError: shapes that do not fit, or a factor with an order.
    """
    size = encoding.block_size
    rows, columns = weight.shape
    _check_factor(factor, columns)
    if factor.order is not None:
        raise ValueError(f"{encoding.name}: blocks are neighbours; act_order needs an affine encoding")
    if columns % size:
        raise ValueError(f"{encoding.name}: {columns} columns are not a multiple of its block of {size}")
    importance = factor.importance
    errors = np.empty((rows, columns), np.float32)
    out = np.empty((rows, columns // size, encoding.block_bytes), np.uint8)
    span = max(size, block // size * size)
    for start, stop in _ranges(columns, span):
        ahead = weight[:, start:stop] - errors[:, :start] @ factor.upper[:start, start:stop]
        for first, end in _ranges(stop, size, start):
            values = ahead[:, first - start : end - start]
            values = values - errors[:, start:first] @ factor.upper[start:first, first:end]
            data = quantize(np.ascontiguousarray(values), importance[first:end])
            rounded = encoding.dequantize(data).reshape(rows, size)
            out[:, first // size] = data.reshape(rows, encoding.block_bytes)
            # What rounding them one by one would have added up to: E U = W - W' for this block's U.
            own = factor.upper[first:end, first:end].astype(np.float64)
            errors[:, first:end] = (values - rounded) @ np.linalg.inv(own).astype(np.float32)
    return GptqResult(out.reshape(-1), None, _loss(errors))


class _Grids:
    """Scales and zero points of the groups, as they are found."""

    def __init__(
        self, form: AffineFormat, rows: int, groups: int, clipping: bool, threads: int | None
    ) -> None:
        self.form = form
        self.stored = np.zeros((rows, groups, form.scale_bytes), np.uint8)
        self.points = np.zeros((rows, groups), np.uint8) if form.has_zero_point else None
        self.scales = np.zeros((rows, groups), np.float32)
        self.zero_points = np.full((rows, groups), form.middle, np.float32)
        self._search = search_of(form, clipping=clipping, weighted=True)
        self._threads = threads

    def find(self, group: int, values: Floats, importance: Floats) -> None:
        """Sets a group's scales by its values (rows, group_size)."""
        from nybble import _core

        form = self.form
        rows, size = values.shape
        values = np.ascontiguousarray(values)
        weights = column_weights(importance, size)
        blocks = np.empty((rows, form.header_bytes + form.code_bytes), np.uint8)

        def work(start: int, stop: int) -> None:
            fits = _core.quantize_affine(
                values[start:stop].reshape(-1), form.bits, size, form.scale, form.has_zero_point,
                blocks[start:stop].reshape(-1), search=self._search, importance=weights,
            )  # fmt: skip
            if not fits:
                raise ValueError(f"{form.name}: a scale of group {group} does not fit {form.scale}")

        over_rows(work, rows, self._threads)
        self.stored[:, group] = blocks[:, : form.scale_bytes]
        self.scales[:, group] = scale_values(np.ascontiguousarray(blocks[:, : form.scale_bytes]), form)
        if self.points is not None:
            self.points[:, group] = blocks[:, form.scale_bytes]
            self.zero_points[:, group] = self.points[:, group]

    def round(self, values: Floats, upper: Floats, group_of: npt.NDArray[np.int64]) -> tuple[Bytes, Floats]:
        """Codes and errors of some columns (rows, columns) with feedback among them."""
        from nybble import _core

        codes, errors = np.empty(values.shape, np.uint8), np.empty_like(values)
        factor, indices = np.ascontiguousarray(upper), group_of.astype(np.int32)

        def work(start: int, stop: int) -> None:
            _core.round_with_feedback(
                values[start:stop], factor, self.scales[start:stop], self.zero_points[start:stop], indices,
                self.form.bits, codes[start:stop], errors[start:stop],
            )  # fmt: skip

        over_rows(work, len(values), self._threads)
        return codes, errors


def _run(
    values: Floats,
    upper: Floats,
    grids: _Grids,
    group_of: npt.NDArray[np.int64],
    span: tuple[int, int],
    *,
    importance: Floats | None,
) -> tuple[Bytes, float]:
    """Codes (rows, columns) and the loss.

    ``span``: columns that a matrix product brings up to date, and how many of them are rounded at once.
    ``importance``: of each column, to find a group's scales by when it is reached; None: they are known.
    """
    rows, columns = values.shape
    size = grids.form.group_size
    codes = np.empty((rows, columns), np.uint8)
    errors = np.empty((rows, columns), np.float32)
    for start, stop in _ranges(columns, span[0]):
        ahead = values[:, start:stop] - errors[:, :start] @ upper[:start, start:stop]
        for first, end in _ranges(stop, span[1], start):
            part = ahead[:, first - start : end - start]
            if first > start:
                part = part - errors[:, start:first] @ upper[start:first, first:end]
            if importance is not None and first % size == 0:
                # A group of more columns than a block begins where the span does.
                own = ahead[:, :size] if first == start else part
                grids.find(first // size, own, importance[first : first + size])
            codes[:, first:end], errors[:, first:end] = grids.round(
                np.ascontiguousarray(part), upper[first:end, first:end], group_of[first:end]
            )
    return codes, _loss(errors)


def _span(group_size: int, block: int, static: bool) -> tuple[int, int]:
    """Columns a matrix product brings up to date, and columns rounded at once: see ``_run``."""
    if static:
        return block, block
    if group_size >= block:
        return group_size, block
    return block // group_size * group_size, group_size


def _ranges(stop: int, step: int, start: int = 0) -> list[tuple[int, int]]:
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]


def _reverse(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each input feature is in an order."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return back


def _loss(errors: Floats) -> float:
    loss = float(sum(np.vdot(row, row) for row in errors.astype(np.float32)))
    if not np.isfinite(loss):
        raise ValueError("feedback grew without bounds: take a larger damping")
    return loss


def _check_factor(factor: GptqFactor, columns: int) -> None:
    if len(factor.upper) != columns:
        raise ValueError(f"the factor is of {len(factor.upper)} input features, the matrix has {columns}")
