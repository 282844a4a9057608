"""Standard operators on arrays that are known: what masks, positions and rotary tables are made of.

Floats are computed in float32 whatever type the file asks for, so that tables come out as exact as
they can. Every result is bounded before it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nybble.errors import FormatError, UnsupportedError
from nybble.formats.onnx.recognise.values import MAX_KNOWN, Array

Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Array | None], Attributes], list[Array]]


def bounded(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, if an array of it is small enough.

    Raises:
        UnsupportedError: it is not.
    """
    found = tuple(int(dim) for dim in shape)
    if any(dim < 0 for dim in found) or math.prod(found) > MAX_KNOWN:
        raise UnsupportedError(f"an array of shape {found} is too large to be part of a mask or table")
    return found


def reshape_to(old: Sequence[int], wanted: Sequence[int], allow_zero: bool = False) -> tuple[int, ...]:
    """The shape that Reshape makes: 0 copies a dimension, -1 is what is left."""
    shape = [
        int(old[at]) if dim == 0 and not allow_zero and at < len(old) else int(dim)
        for at, dim in enumerate(wanted)
    ]
    total = math.prod(old)
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = total // rest if rest else 0
    if any(dim < 0 for dim in shape) or math.prod(shape) != total:
        raise FormatError(f"Reshape from {tuple(old)} to {tuple(wanted)}")
    return tuple(shape)


def slices(
    shape: Sequence[int], starts: Any, ends: Any, axes: Any = None, steps: Any = None
) -> tuple[slice, ...]:
    """NumPy's slices for the operator Slice."""
    rank = len(shape)
    begin, end = [int(i) for i in starts.reshape(-1)], [int(i) for i in ends.reshape(-1)]
    where = list(range(len(begin))) if axes is None else [int(i) for i in axes.reshape(-1)]
    step = [1] * len(begin) if steps is None else [int(i) for i in steps.reshape(-1)]
    if not len(begin) == len(end) == len(where) == len(step) or 0 in step:
        raise FormatError("Slice: starts, ends, axes and steps do not fit")
    found = [slice(None)] * rank
    for axis, first, last, stride in zip(where, begin, end, step, strict=True):
        at = positive_axis(axis, rank)
        size = shape[at]
        # NumPy reads -1 as an end from the back; the operator's very small numbers mean "before 0".
        last_seen = None if stride < 0 and last < -size else last
        found[at] = slice(first, last_seen, stride)
    return tuple(found)


def positive_axis(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise FormatError(f"axis {axis} of an array with {rank}")
    return axis % rank


def axes_of(given: Array | None, attributes: Attributes) -> list[int] | None:
    """Axes as an input (newer operators) or an attribute (older ones)."""
    if given is not None:
        return [int(axis) for axis in np.asarray(given).reshape(-1)]
    axes = attributes.get("axes")
    return None if axes is None else list(axes)


def unsqueezed(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The shape that Unsqueeze makes."""
    rank = len(shape) + len(axes)
    where = {positive_axis(axis, rank) for axis in axes}
    if len(where) != len(axes):
        raise FormatError("Unsqueeze: an axis is given twice")
    rest = iter(shape)
    return tuple(1 if axis in where else next(rest) for axis in range(rank))


def squeezed(shape: Sequence[int], axes: Sequence[int] | None) -> tuple[int, ...]:
    """The shape that Squeeze makes."""
    if axes is None:
        return tuple(dim for dim in shape if dim != 1)
    where = {positive_axis(axis, len(shape)) for axis in axes}
    if any(shape[axis] != 1 for axis in where):
        raise FormatError(f"Squeeze: axes {axes} of {tuple(shape)}")
    return tuple(dim for axis, dim in enumerate(shape) if axis not in where)


def split_sizes(size: int, given: Array | None, attributes: Attributes, outputs: int) -> list[int]:
    """Sizes of Split's outputs."""
    if given is not None:
        sizes = [int(i) for i in np.asarray(given).reshape(-1)]
    elif "split" in attributes:
        sizes = list(attributes["split"])
    else:
        each = -(-size // outputs)
        sizes = [each] * (outputs - 1) + [size - each * (outputs - 1)]
    if sum(sizes) != size or min(sizes) < 0 or len(sizes) != outputs:
        raise FormatError(f"Split: {size} into {sizes}")
    return sizes


def floats(array: Array) -> Array:
    """Floats as float32; others stay."""
    return array.astype(np.float32) if array.dtype.kind == "f" and array.dtype != np.float32 else array


def _one(function: Callable[..., Any]) -> Operator:
    def run(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
        arrays = [item for item in inputs if item is not None]
        bounded(np.broadcast_shapes(*(item.shape for item in arrays)))
        with np.errstate(all="ignore"):
            return [floats(np.asarray(function(*arrays)))]

    return run


def _reduce(function: Callable[..., Any]) -> Operator:
    def run(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
        array = _first(inputs)
        axes = axes_of(inputs[1] if len(inputs) > 1 else None, attributes)
        if not axes and attributes.get("noop_with_empty_axes"):
            return [array]
        where = None if not axes else tuple(positive_axis(axis, array.ndim) for axis in axes)
        return [floats(np.asarray(function(array, axis=where, keepdims=bool(attributes.get("keepdims", 1)))))]

    return run


def _first(inputs: Sequence[Array | None]) -> Array:
    if not inputs or inputs[0] is None:
        raise FormatError("an operator lacks its first input")
    return inputs[0]


def _need(inputs: Sequence[Array | None], count: int) -> list[Array]:
    found = [item for item in inputs[:count] if item is not None]
    if len(found) < count:
        raise FormatError(f"an operator lacks one of its {count} inputs")
    return found


def _optional(inputs: Sequence[Array | None], at: int) -> Array | None:
    return inputs[at] if len(inputs) > at else None


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        if not b.all():
            raise FormatError("Div: an integer divided by zero")
        return np.trunc(a / b).astype(np.int64)
    return a / b


def _modulo(a: Array, b: Array) -> Array:
    if b.dtype.kind in "iu" and not b.all():
        raise FormatError("Mod: an integer modulo zero")
    return np.asarray(np.mod(a, b))


def _power(a: Array, b: Array) -> Array:
    return np.asarray(a.astype(np.float64) ** b.astype(np.float64)).astype(a.dtype)


def cast(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    """Cast; floats stay float32, integers int64."""
    array, to = _first(inputs), attributes.get("to")
    if to in (1, 10, 11, 16):
        return [array.astype(np.float32)]
    if to in (2, 3, 4, 5, 6, 7, 12, 13):
        with np.errstate(all="ignore"):
            return [array.astype(np.int64)]
    if to == 9:
        return [array.astype(np.bool_)]
    raise UnsupportedError(f"Cast to type {to}")


def _gather(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    data, index = _need(inputs, 2)
    axis = positive_axis(attributes.get("axis", 0), data.ndim)
    size = data.shape[axis]
    if index.size and not (-size <= index.min() and index.max() < size):
        raise FormatError(f"Gather: indices {index.min()} to {index.max()} of {size}")
    bounded((*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]))
    return [np.take(data, index, axis=axis)]


def _range(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    start, limit, delta = (item.reshape(-1)[0] for item in _need(inputs, 3))
    if delta == 0:
        raise FormatError("Range: a step of 0")
    bounded([max(0, math.ceil((float(limit) - float(start)) / float(delta)))])
    return [floats(np.arange(start, limit, delta))]


def _expand(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array, shape = _need(inputs, 2)
    wanted = bounded(np.broadcast_shapes(array.shape, bounded(shape.tolist())))
    return [np.broadcast_to(array, wanted)]


def _concat(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    arrays = [item for item in inputs if item is not None]
    bounded([sum(item.size for item in arrays)])
    return [np.concatenate(arrays, axis=attributes["axis"])]


def _tile(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array, repeats = _need(inputs, 2)
    if repeats.size != array.ndim:
        raise FormatError("Tile: one number of repeats for each axis is needed")
    bounded([dim * max(0, int(n)) for dim, n in zip(array.shape, repeats.reshape(-1), strict=True)])
    return [np.tile(array, [int(n) for n in repeats.reshape(-1)])]


def _split(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array = _first(inputs)
    axis = positive_axis(attributes.get("axis", 0), array.ndim)
    sizes = split_sizes(array.shape[axis], _optional(inputs, 1), attributes, attributes["outputs"])
    return list(np.split(array, np.cumsum(sizes)[:-1], axis=axis))


def _trilu(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array, k = _first(inputs), _optional(inputs, 1)
    shift = 0 if k is None else int(k.reshape(-1)[0])
    if not -(1 << 31) < shift < 1 << 31:
        raise FormatError("Trilu: k is out of range")
    return [(np.triu if attributes.get("upper", 1) else np.tril)(array, shift)]


def _cumsum(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array, axis = _need(inputs, 2)
    if attributes.get("reverse") or attributes.get("exclusive"):
        raise UnsupportedError("CumSum that is reversed or exclusive")
    return [floats(np.cumsum(array, axis=positive_axis(int(axis.reshape(-1)[0]), array.ndim)))]


def _constant_of_shape(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    value = attributes.get("value_array", np.zeros(1, np.float32))
    return [np.broadcast_to(value.reshape(-1)[0], bounded(_first(inputs).reshape(-1).tolist()))]


def _matmul(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    a, b = _need(inputs, 2)
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise FormatError(f"MatMul: {a.shape} and {b.shape}")
    wide = math.prod(a.shape) * (b.shape[-1] if b.ndim > 1 else 1)
    bounded([wide])
    return [floats(np.matmul(a, b))]


def _slice(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array = _first(inputs)
    starts, ends = _need(inputs[1:], 2)
    return [array[slices(array.shape, starts, ends, _optional(inputs, 3), _optional(inputs, 4))]]


def _gather_nd(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    data, index = _need(inputs, 2)
    if attributes.get("batch_dims", 0):
        raise UnsupportedError("GatherND with batch_dims")
    depth = index.shape[-1]
    bounded((*index.shape[:-1], *data.shape[depth:]))
    for axis in range(depth):
        found = index[..., axis]
        if found.size and not (-data.shape[axis] <= found.min() and found.max() < data.shape[axis]):
            raise FormatError("GatherND: an index is out of range")
    return [data[tuple(np.moveaxis(index, -1, 0))]]


def _transpose(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array = _first(inputs)
    order = attributes.get("perm")
    if order is not None and sorted(order) != list(range(array.ndim)):
        raise FormatError(f"Transpose: {order} of an array with {array.ndim} axes")
    return [np.transpose(array, order)]


def _reshape(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array, shape = _need(inputs, 2)
    return [
        array.reshape(reshape_to(array.shape, shape.reshape(-1).tolist(), bool(attributes.get("allowzero"))))
    ]


def _unsqueeze(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array = _first(inputs)
    return [array.reshape(unsqueezed(array.shape, axes_of(_optional(inputs, 1), attributes) or []))]


def _squeeze(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array = _first(inputs)
    return [array.reshape(squeezed(array.shape, axes_of(_optional(inputs, 1), attributes)))]


def _shape(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    dims = _first(inputs).shape[attributes.get("start", 0) : attributes.get("end")]
    return [np.array(dims, np.int64)]


def _flatten(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    array, axis = _first(inputs), attributes.get("axis", 1)
    if not -array.ndim <= axis <= array.ndim:
        raise FormatError(f"Flatten: axis {axis} of an array with {array.ndim}")
    at = axis + array.ndim if axis < 0 else axis
    return [array.reshape(math.prod(array.shape[:at]), -1)]


OPERATORS: Mapping[str, Operator] = {
    "Abs": _one(np.abs), "Add": _one(np.add), "And": _one(np.logical_and), "Cast": cast,
    "Ceil": _one(np.ceil), "Concat": _concat, "ConstantOfShape": _constant_of_shape, "Cos": _one(np.cos),
    "CumSum": _cumsum, "Div": _one(_divide), "Equal": _one(np.equal), "Exp": _one(np.exp),
    "Expand": _expand,
    "Flatten": _flatten, "Floor": _one(np.floor), "Gather": _gather, "GatherND": _gather_nd,
    "Greater": _one(np.greater),
    "GreaterOrEqual": _one(np.greater_equal), "Identity": _one(lambda a: a), "IsNaN": _one(np.isnan),
    "Less": _one(np.less), "LessOrEqual": _one(np.less_equal), "Log": _one(np.log), "MatMul": _matmul,
    "Max": _one(lambda *a: np.maximum.reduce(np.broadcast_arrays(*a))),
    "Min": _one(lambda *a: np.minimum.reduce(np.broadcast_arrays(*a))),
    "Mod": _one(_modulo), "Mul": _one(np.multiply),
    "Neg": _one(np.negative), "Not": _one(np.logical_not), "Or": _one(np.logical_or), "Pow": _one(_power),
    "Range": _range, "Reciprocal": _one(lambda a: 1 / a), "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min), "ReduceMean": _reduce(np.mean), "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum), "Reshape": _reshape, "Shape": _shape, "Sin": _one(np.sin),
    "Size": lambda inputs, attributes: [np.array(_first(inputs).size)], "Slice": _slice,
    "Split": _split, "Sqrt": _one(np.sqrt), "Squeeze": _squeeze, "Sub": _one(np.subtract), "Tile": _tile,
    "Transpose": _transpose, "Trilu": _trilu, "Unsqueeze": _unsqueeze, "Where": _one(np.where),
    "Xor": _one(np.logical_xor),
}  # fmt: skip
"""By operator type; the attribute ``outputs`` tells Split how many it has."""
