"""Quantizers of GGUF's block types, in the native core (``native/quantize``).

What is made small is the squared error of the weights, each column's weighed by its importance: the mean
square of what the column is multiplied with (an importance matrix). That is the error of the product with
inputs whose elements do not depend on each other. Without importance all columns count alike; llama.cpp
then weighs with the squares of the weights themselves, for which there is no such reason.

How each family of types is searched is said in ``native/quantize/generic`` and, in NumPy, in
``blocks_reference.py``. The searches are our own; the problem is that of
https://github.com/ggml-org/llama.cpp/pull/1684 (K types) and
https://github.com/ggml-org/llama.cpp/pull/4773 (codebooks).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import ENCODINGS, encoding
from nybble.checkpoint.encodings.base import Bytes
from nybble.errors import UnsupportedError

BLOCK_TYPES: tuple[str, ...] = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "mxfp4", "iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s", "nvfp4", "tq1_0", "tq2_0", "q1_0", "q2_0",
)  # fmt: skip
"""Encodings that ``quantize_blocks`` makes."""


def quantize_blocks(
    values: npt.NDArray[np.float32],
    encoding_name: str,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> Bytes:
    """The rows of a matrix as blocks of a GGUF type, with the smallest weighted squared error that is found.

    The same bytes come out whatever the threads and the instruction set are.

    Args:
        values: float32 (rows, columns); columns a multiple of the encoding's block size.
        encoding_name: one of ``BLOCK_TYPES``.
        importance: float32 (columns,), not negative: what each column weighs in the error, up to a factor.
            Within a block nothing weighs less than a millionth of the largest, and in a block that is zero
            everywhere all columns weigh alike.
        threads: None: as many as the machine has for this process.

    Returns:
        Flat uint8, row after row.

    Raises:
        UnsupportedError: the encoding is unknown or cannot be made.
        ValueError: shapes do not fit, a value is not finite, an importance is negative or not finite, or a
            scale does not fit its type (values beyond about 65504 times the largest code).
    """
    from nybble import _core

    if encoding_name not in BLOCK_TYPES:
        encoding(encoding_name)  # says so if there is no such encoding
        raise UnsupportedError(
            f"there is no block quantizer for {encoding_name}; there are {', '.join(BLOCK_TYPES)}"
        )
    row = ENCODINGS[encoding_name]
    matrix = np.ascontiguousarray(values, np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{encoding_name}: a matrix (rows, columns) is needed, not shape {matrix.shape}")
    rows, columns = matrix.shape
    if columns % row.block_size:
        raise ValueError(
            f"{encoding_name}: rows of {columns} elements are not whole blocks of {row.block_size}"
        )
    weights = None if importance is None else _checked_importance(encoding_name, importance, columns)
    if threads is not None and threads < 1:
        raise ValueError(f"{threads} threads: at least one is needed")
    out = np.empty(row.nbytes(rows * columns), np.uint8)
    count = threads if threads is not None else _core.default_threads()
    wrong = _core.quantize_blocks(encoding_name, matrix, weights, count, out)
    if wrong:
        raise ValueError(f"{encoding_name}: {_what_is_wrong(wrong, matrix)}")
    return out


def _what_is_wrong(wrong: str, matrix: npt.NDArray[np.float32]) -> str:
    if wrong == "not finite":
        i, j = (int(k) for k in np.argwhere(~np.isfinite(matrix))[0])
        return f"element ({i}, {j}) is {matrix[i, j]}; only finite values can be quantized"
    return f"a scale does not fit in float16; the largest magnitude is {np.abs(matrix).max():g}"


def _checked_importance(
    name: str, importance: npt.NDArray[np.float32], columns: int
) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        weights = np.ascontiguousarray(importance, np.float32)
    if weights.shape != (columns,):
        raise ValueError(f"{name}: importance has shape {weights.shape}, the matrix {columns} columns")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        column = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name}: the importance of column {column} is {weights[column]}, not a finite number from 0"
        )
    return weights
