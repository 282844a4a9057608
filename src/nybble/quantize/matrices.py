"""One matrix into one encoding: which function rounds, and what was lost.

``round_plainly`` streams: a piece of rows at a time in every core, whatever the size of the matrix. The
others need the whole matrix as float32 and what calibration saw of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.encodings.affine import AffineFormat, affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.convert.errors import ValueErrors
from nybble.convert.made import MadeTensor
from nybble.convert.relation import recoded
from nybble.errors import UnsupportedError
from nybble.quantize.blocks import BLOCK_TYPES, quantize_blocks
from nybble.quantize.gptq import GptqFactor, quantize_blocks_gptq, quantize_gptq
from nybble.quantize.rtn import quantize_rtn
from nybble.quantize.statistics import InputStatistics

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SAME_AS: dict[str, str] = {"q4_0": "int4_g32_f16"}
"""GGUF types with the bytes of an affine encoding, for which feedback can go from column to column."""
_ROWS = 1 << 22  # elements whose errors are summed at a time


def check_encoding(name: str) -> None:
    """Whether there is something that rounds to an encoding.

    Raises:
        UnsupportedError: there is not.
    """
    form = affine_format(name)
    if form is not None and not form.has_minimum:
        return
    if name not in BLOCK_TYPES:
        encoding(name)
        raise UnsupportedError(f"there is no quantizer for {name}")


def round_matrix(
    values: Floats,
    name: str,
    *,
    importance: Floats | None = None,
    clipping: bool = True,
    threads: int | None = None,
) -> Bytes:
    """Float32 (rows, columns) to nearest, columns weighing as ``importance`` (columns,) says.

    ``clipping`` is of affine encodings: see ``quantize_rtn``.
    """
    form = affine_format(name)
    if form is not None:
        return quantize_rtn(values, form, clipping=clipping, importance=importance, threads=threads)
    return quantize_blocks(values, name, importance=importance, threads=threads)


def round_plainly(
    tensor: Tensor, name: str, importance: Floats | None, *, output: bool = False
) -> MadeTensor:
    """A matrix rounded to nearest.

    ``output``: the matrix of the logits, of which without importance nothing is cut off: a few of its inputs
    are hundreds of times larger than the others.
    """
    columns = tensor.shape[-1]
    noted: list[ValueErrors] = []
    clipping = importance is not None or not output

    def quantize(values: Floats) -> Bytes:
        return round_matrix(
            values.reshape(-1, columns), name, importance=importance, clipping=clipping, threads=1
        )

    made = recoded(tensor, encoding(name), done=noted.append, quantize=quantize)
    done = made.changed(data=made.data)
    weighted = "" if importance is None else ", weighted"
    return MadeTensor(done, f"quantized{weighted}", noted[0] if noted else ValueErrors())


def made_of(tensor: Tensor, values: Floats, name: str, data: Bytes, how: str) -> MadeTensor:
    """The encoded bytes of a matrix with the errors of what they stand for."""
    kind = encoding(name)
    made = tensor.changed(encoding=kind, data=data)
    errors = ValueErrors()
    for part, decoded in _pieces(values, data, kind):
        errors = errors + ValueErrors.of(part, decoded)
    return MadeTensor(made, how, errors)


def _pieces(values: Floats, data: Bytes, kind: Encoding) -> Iterator[tuple[Floats, Floats]]:
    """Some rows of the matrix at a time, and what their bytes stand for in the same shape."""
    row_bytes = data.size // len(values)
    step = max(1, _ROWS // values.shape[1])
    for start in range(0, len(values), step):
        part = values[start : start + step]
        decoded = kind.dequantize(data[start * row_bytes : (start + step) * row_bytes])
        yield part, decoded.reshape(part.shape)


def with_feedback(
    values: Floats,
    name: str,
    statistics: InputStatistics,
    factor: Callable[[bool], GptqFactor],
    *,
    threads: int | None = None,
) -> tuple[Bytes, str]:
    """A matrix rounded by GPTQ: bytes, and how.

    Affine encodings are rounded in the order of falling importance, with static groups: an order of the
    stored columns gains next to nothing beyond that, and few programs know it. For other blocks feedback
    goes from block to block; whether that is better than rounding to nearest is measured, and the better one
    taken.

    Args:
        values: (out_features, in_features) float32.
        name: the encoding.
        statistics: of the input, with the Hessian.
        factor: the factor of that Hessian, with or without act-order.
        threads: at most; None: the cores that this process may use.
    """
    form = form_of(name)
    if form is not None:
        result = quantize_gptq(values, factor(True), form, static_groups=True, threads=threads)
        return result.data, "gptq"
    kind = encoding(name)

    def quantize(block: Floats, weights: Floats) -> Bytes:
        return quantize_blocks(block, name, importance=weights, threads=threads)

    fed = quantize_blocks_gptq(values, factor(False), kind, quantize).data
    plain = quantize_blocks(values, name, importance=statistics.mean_squares, threads=threads)
    better = output_error(values, fed, kind, statistics) < output_error(values, plain, kind, statistics)
    return (fed, "gptq") if better else (plain, "weighted: better than gptq here")


def output_error(values: Floats, data: Bytes, kind: Encoding, statistics: InputStatistics) -> float:
    """tr(D H D^T): the squared error of the linear's output over the calibration text."""
    assert statistics.hessian is not None
    total = 0.0
    for part, decoded in _pieces(values, data, kind):
        difference = decoded - part
        total += float(np.vdot(difference @ statistics.hessian, difference))
    return total


def form_of(name: str) -> AffineFormat | None:
    """The affine format of an encoding, GGUF types with the same bytes included."""
    return affine_format(SAME_AS.get(name, name))
