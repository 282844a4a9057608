"""The upper Cholesky factor of the inverse of a symmetric matrix, from matrix products.

H^-1 = U^T U with U upper triangular, without computing H^-1: with the order of rows and columns turned
around, H = R R^T with R upper triangular is an ordinary Cholesky factorization, and U = R^-1. That is
one factorization and one triangular inverse, a third of the work of two factorizations and a full
inverse, and the inverse of a badly conditioned matrix is never formed. float64 throughout: with a
hundredth of the mean diagonal added, H may still have a condition of a million.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

_SMALL = 64  # matrices that LAPACK inverts as they are


def inverse_factor(matrix: Doubles) -> Doubles:
    """Upper triangular U (n, n) with U^T U the inverse of a symmetric positive definite matrix (n, n).

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    factor = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    out = np.ascontiguousarray(factor)
    _invert_upper(out)
    return out


def _invert_upper(matrix: Doubles) -> None:
    """Inverts an upper triangular matrix in its place: the inverse of [[A, B], [0, C]] is
    [[A', -A' B C'], [0, C']] with the inverses A' and C'.
    """
    size = len(matrix)
    if size <= _SMALL:
        matrix[:] = np.triu(np.linalg.inv(matrix))
        return
    half = size // 2
    first, last, corner = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    _invert_upper(first)
    _invert_upper(last)
    corner[:] = -(first @ corner) @ last
