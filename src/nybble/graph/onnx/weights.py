"""Weights as ONNX holds them: which encoding each gets, and its codes, scales and zero points.

Group-wise integers are packed again as they are; only float weights are ever rounded. Work goes on
in chunks of rows, so a matrix takes its output's memory and little more.

``MatMulNBits`` wants codes (rows, blocks, bytes of a block) with neighbours in one byte, lowest bits
first, scales (rows, blocks), and zero points (rows, bytes) packed along a row. Source:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts, affine_format, scale_values, split
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.graph.onnx.nodes import NUMPY_TYPES, ElementType
from nybble.graph.onnx.target import Method, Target

FLOATS = ("f32", "f16", "bf16")
LARGEST_BLOCK = 256
"""ONNX Runtime's CPU kernels know blocks of 16 to 256."""
_CHUNK = 1 << 22  # elements worked on at a time


@dataclass(frozen=True)
class Rows:
    """Rows ``begin .. end`` of some matrices with as many columns, one under the other."""

    parts: tuple[tuple[Tensor, int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return sum(end - begin for _, begin, end in self.parts), self.parts[0][0].shape[1]

    def chunks(self) -> Iterator[tuple[int, Encoding, Bytes]]:
        """First row, encoding and encoded bytes of one run of rows after another."""
        columns = self.shape[1]
        step = max(1, _CHUNK // columns)
        row = 0
        for tensor, begin, end in self.parts:
            data = tensor.data
            size = tensor.encoding.nbytes(columns)
            for start in range(begin, end, step):
                stop = min(start + step, end)
                yield row, tensor.encoding, data[start * size : stop * size]
                row += stop - start


def written_encoding(tensor: Tensor, target: Target, method: Method | None, *, output: bool) -> Encoding:
    """The encoding that a linear's weight has in the written model.

    ``output``: the matrix of the logits, which AWQ leaves as float.

    Raises:
        ValueError: an encoding that ONNX cannot hold, or a float weight where the target needs
            integers and no method was named.
    """
    name = tensor.encoding.name
    if name in FLOATS:
        if target.weights != "int4":
            return encoding(target.element_type)
        if (method or target.method) is None:
            if output:
                return encoding(target.element_type)
            raise ValueError(
                f"{tensor.name} is {name}, but {target.name} wants weights that are int4 already (as in an"
                " AWQ checkpoint); to round them to nearest instead, ask for method 'rtn'"
            )
        block = next((size for size in (target.block_size, 16) if tensor.shape[1] % size == 0), None)
        return encoding(target.element_type if block is None else f"int4_g{block}_{target.element_type}")
    form = affine_format(name)
    block = None if form is None else block_size(form)
    if form is None or form.bits == 3 or block is None:
        raise ValueError(
            f"{tensor.name} is {name}, which ONNX cannot hold; float and int2, int4 or int8 in groups that 16"
            " divides can be written: convert the tensor first"
        )
    return encoding(replace(form, group_size=block, scale=target.element_type).name)


def block_size(form: AffineFormat) -> int | None:
    """The blocks that groups are cut into: powers of two from 16; None where there is none."""
    largest = form.group_size & -form.group_size
    return min(largest, LARGEST_BLOCK) if largest >= 16 else None


def nbits_arrays(rows: Rows, written: AffineFormat, element_type: ElementType) -> list[npt.NDArray[Any]]:
    """Codes, scales and, where the form has them, zero points as ``MatMulNBits`` wants them.

    Of a form with minima: codes, scales, minima (rows, blocks), and the code in the middle; codes are moved
    so that it stands where the zero point of symmetric codes is.
    """
    count, columns = rows.shape
    blocks = columns // written.group_size
    codes = np.empty((count, blocks, written.code_bytes), np.uint8)
    scales = np.empty((count, blocks), NUMPY_TYPES[element_type])
    zeros = np.zeros((count, -(-blocks * written.bits // 8)), np.uint8) if written.has_zero_point else None
    minima = np.empty_like(scales) if written.has_minimum else None
    for row, parts, form in affine_parts(rows, written):
        n = len(parts.codes)
        repeat = form.group_size // written.group_size
        codes[row : row + n] = pack_neighbours(
            parts.codes.reshape(n, blocks, written.group_size), written.bits
        )
        values = np.repeat(scale_values(parts.scales, form), repeat, axis=1)
        scales[row : row + n] = _fitting(values, element_type, rows.parts[0][0].name)
        if zeros is not None and parts.zero_points is not None:
            points = np.repeat(parts.zero_points, repeat, axis=1)
            padding = zeros.shape[1] * 8 // written.bits - blocks
            zeros[row : row + n] = pack_neighbours(np.pad(points, ((0, 0), (0, padding))), written.bits)
        if minima is not None and parts.minima is not None:
            values = np.repeat(scale_values(parts.minima, form), repeat, axis=1)
            minima[row : row + n] = _fitting(values, element_type, rows.parts[0][0].name)
    if minima is not None:
        middle = middle_code(codes, written)
        codes += np.uint8(written.middle - middle)
        return [codes, scales, minima, np.array(middle, NUMPY_TYPES[element_type])]
    return [codes, scales] if zeros is None else [codes, scales, zeros]


def middle_code(codes: Bytes, form: AffineFormat) -> int:
    """The middle of the codes that occur, where a byte holds one: they may have five bits; else of all."""
    return form.middle if form.bits < 8 else (int(codes.max(initial=0)) + 1) // 2


def pack_neighbours(codes: Bytes, bits: int) -> Bytes:
    """Codes (..., n), one a byte, as (..., n * bits / 8): neighbours share a byte, the first lowest."""
    each = 8 // bits
    packed: Bytes = codes[..., ::each].copy()
    for place in range(1, each):
        packed |= codes[..., place::each] << np.uint8(place * bits)
    return packed


def float_array(tensor: Tensor, element_type: ElementType) -> npt.NDArray[Any]:
    """A tensor's values in its shape. bf16 must be asked for where the tensor is bf16 itself."""
    if tensor.encoding.name == element_type:
        return tensor.data.view(NUMPY_TYPES[element_type]).reshape(tensor.shape)
    return _fitting(tensor.dequantize(), element_type, tensor.name)


def float_rows(rows: Rows, element_type: ElementType, *, transposed: bool) -> npt.NDArray[Any]:
    """The matrix (rows, columns), or (columns, rows) as ``MatMul`` wants it."""
    count, columns = rows.shape
    out = np.empty((columns, count) if transposed else (count, columns), NUMPY_TYPES[element_type])
    for row, kind, data in rows.chunks():
        values = _fitting(kind.dequantize(data), element_type, rows.parts[0][0].name).reshape(-1, columns)
        if transposed:
            out[:, row : row + len(values)] = values.T
        else:
            out[row : row + len(values)] = values
    return out


def vector_array(parts: Sequence[tuple[Tensor, int, int]], element_type: ElementType) -> npt.NDArray[Any]:
    """Ranges of vectors, one after another."""
    return np.concatenate([float_array(tensor, element_type)[begin:end] for tensor, begin, end in parts])


def affine_parts(rows: Rows, written: AffineFormat) -> Iterator[tuple[int, AffineParts, AffineFormat]]:
    """First row, parts and form of one run of rows after another: as they are, floats rounded to nearest."""
    quantize = encoding(written.name).quantize
    for row, kind, data in rows.chunks():
        form = affine_format(kind.name)
        if form is None:
            assert quantize is not None  # floats are never written as a form that has none
            integers = quantize(kind.dequantize(data))
        else:
            integers = data
        yield row, split(integers, rows.shape[1], form or written), form or written


def _fitting(values: npt.NDArray[np.float32], element_type: ElementType, name: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        result = values.astype(NUMPY_TYPES[element_type])
    if element_type == "f16" and not np.array_equal(np.isfinite(result), np.isfinite(values)):
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise ValueError(f"{name}: {largest:g} does not fit in float16; choose a target with float32")
    return result
