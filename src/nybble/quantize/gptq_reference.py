"""GPTQ in plain NumPy, one column at a time: what ``gptq.py`` does in blocks and natively.

This is the order in which errors are fed back. ``factor`` is the upper triangular U with U^T U = H^-1,
rows and columns in the order in which columns are rounded:

    for column j:                                        (all rows at once)
        where a group begins: its scale and zero point, from the values as they are by now
        code[j]  = nearest code of value[j]
        error[j] = (value[j] - rounded[j]) / U[j, j]
        for every later column k: value[k] -= error[j] * U[j, k]

The sum of all squared errors is tr(D H D^T), D being the difference of the matrices: what the method
minimises greedily. Lazy blocks sum the same products in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Grid = tuple[Floats, Floats]
"""Scales and zero points, float32 (rows) each."""


def round_with_feedback(
    values: Floats, factor: Floats, grid: Callable[[int, Floats], Grid], bits: int
) -> tuple[Bytes, Floats]:
    """Codes and errors of all columns.

    Args:
        values: (rows, columns).
        factor: (columns, columns), upper triangular.
        grid: given a column and the values as they are by then (rows, columns), the scales and zero
            points of that column.
        bits: of a code.

    Returns:
        codes uint8 (rows, columns) and errors float32 (rows, columns).
    """
    values = values.copy()
    codes = np.empty(values.shape, np.uint8)
    errors = np.empty_like(values)
    highest = np.float32(2**bits - 1)
    for j in range(values.shape[1]):
        scale, zero = grid(j, values)
        with np.errstate(divide="ignore"):
            inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        rounded = np.rint(np.clip(values[:, j] * inverse, -zero, highest - zero))
        codes[:, j] = rounded + zero
        errors[:, j] = (values[:, j] - rounded * scale) / factor[j, j]
        values[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return codes, errors
