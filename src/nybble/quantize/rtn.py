"""RTN: round to nearest, the method that looks at one weight at a time and needs no calibration.

Each group of a row gets a scale, and a zero point or none, and every weight the nearest code. With
``clipping`` the scale is searched for: a range smaller than that of the values cuts the largest ones
off and makes the steps between all the others finer. The one with the smallest squared error is taken;
with ``importance`` (mean squares of the inputs, from calibration) errors count as much as the inputs
that they meet. Without ``clipping`` the extreme values get the outermost codes.

2, 3, 4 and 8 bits, symmetric or with zero points, groups from 16 columns to the whole row: whatever
``nybble.checkpoint.encodings.affine`` can hold. The plain description, which the native core follows to
the bit, is ``quantize_groups`` in ``affine_reference.py`` there.

Sources: affine codes arXiv:1712.05877; the range with the smallest squared error arXiv:1902.06822 (OMSE).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.affine import AffineFormat, affine_format
from nybble.quantize.row_threads import over_rows

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Search = Literal["none", "narrow", "wide"]

NARROW_UP_TO = 64
"""Groups of more columns get the wide search: their largest value may be far from all the others."""
LEAST_IMPORTANCE = 1e-4
"""Of the mean: no column is worth nothing, for calibration saw only some text."""


def quantize_rtn(
    weight: Floats,
    form: AffineFormat,
    *,
    clipping: bool = True,
    importance: npt.NDArray[np.floating] | None = None,
    threads: int | None = None,
) -> Bytes:
    """The matrix rounded to an affine encoding.

    Args:
        weight: (out_features, in_features) float32, finite.
        form: the encoding; a group may be the whole row.
        clipping: search for the range with the smallest squared error.
        importance: (in_features,), what a squared error counts in each column, 0 or more, in any unit;
            None: all alike. Only the search looks at it.
        threads: at most; None: the cores that this process may use.

    Returns:
        flat uint8, the encoded rows one after another.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, importance without clipping, or
            a scale that does not fit its type.
    """
    columns = checked_columns(weight, form)
    row_bytes = columns // form.group_size * (form.header_bytes + form.code_bytes)
    out = np.empty(len(weight) * row_bytes, np.uint8)
    _round(weight, form, clipping, importance, threads, out=out)
    return out


def round_rtn(
    weight: Floats,
    form: AffineFormat,
    *,
    clipping: bool = True,
    importance: npt.NDArray[np.floating] | None = None,
    threads: int | None = None,
) -> Floats:
    """What ``quantize_rtn`` of the same arguments stands for: float32 in the shape of ``weight``."""
    checked_columns(weight, form)
    rounded = np.empty(weight.shape, np.float32)
    _round(weight, form, clipping, importance, threads, rounded=rounded)
    return rounded


def checked_columns(weight: Floats, form: AffineFormat) -> int:
    """Columns of a matrix that the encoding can hold.

    Raises:
        ValueError: it cannot, or a value is not finite.
    """
    if affine_format(form.name) != form:
        raise ValueError(f"there is no encoding {form.name}")
    if form.has_minimum:
        raise ValueError(f"{form.name}: methods make scales and zero points, not minima; leave out the _m")
    if weight.ndim != 2 or weight.dtype != np.float32:
        raise ValueError(f"a float32 matrix is needed, not {weight.dtype} of shape {weight.shape}")
    columns = int(weight.shape[1])
    if columns == 0 or columns % form.group_size:
        raise ValueError(
            f"{form.name}: {columns} columns are not a multiple of the group size {form.group_size}"
        )
    if not np.isfinite(weight).all():
        row, column = np.argwhere(~np.isfinite(weight))[0]
        raise ValueError(f"{form.name}: the value in row {row}, column {column} is {weight[row, column]}")
    return columns


def column_weights(importance: npt.NDArray[np.floating], columns: int) -> Floats:
    """Importance as the core wants it: float32 (columns,), about 1 in the mean, all above 0.

    Raises:
        ValueError: another shape, or a value that is negative or not finite.
    """
    given = np.asarray(importance, np.float64)
    if given.shape != (columns,):
        raise ValueError(f"importance has shape {given.shape}; one value for each of {columns} columns")
    if not np.isfinite(given).all() or given.min(initial=0) < 0:
        raise ValueError("importance must be finite and not negative")
    mean = float(given.mean())
    if mean == 0:
        return np.ones(columns, np.float32)
    return np.maximum(given / mean, LEAST_IMPORTANCE).astype(np.float32)


def search_of(form: AffineFormat, *, clipping: bool, weighted: bool) -> Search:
    """Which steps are tried: names as in ``affine_reference``."""
    if not clipping:
        return "none"
    return "wide" if weighted or form.group_size > NARROW_UP_TO else "narrow"


def _round(
    weight: Floats,
    form: AffineFormat,
    clipping: bool,
    importance: npt.NDArray[np.floating] | None,
    threads: int | None,
    *,
    out: Bytes | None = None,
    rounded: Floats | None = None,
) -> None:
    from nybble import _core

    if importance is not None and not clipping:
        raise ValueError("importance decides which clipping is best: it needs clipping=True")
    rows, columns = weight.shape
    weights = None if importance is None else column_weights(importance, columns)
    search = search_of(form, clipping=clipping, weighted=weights is not None)
    values = np.ascontiguousarray(weight)
    row_bytes = 0 if out is None else out.size // max(rows, 1)

    def work(start: int, stop: int) -> None:
        fits = _core.quantize_affine(
            values[start:stop].reshape(-1),
            form.bits,
            form.group_size,
            form.scale,
            form.has_zero_point,
            None if out is None else out[start * row_bytes : stop * row_bytes],
            search=search,
            importance=weights,
            rounded=None if rounded is None else rounded[start:stop].reshape(-1),
        )
        if not fits:
            raise ValueError(f"{form.name}: a scale in rows {start} to {stop - 1} does not fit {form.scale}")

    over_rows(work, rows, threads)
