"""Rules for operators that move elements: activations become index arrays, weights stay lazy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nybble.formats.onnx.recognise import minima, numeric
from nybble.formats.onnx.recognise.layout import heads_of
from nybble.formats.onnx.recognise.probe import Call, Outputs, Rule
from nybble.formats.onnx.recognise.values import Array, Centres, Known, Quantized, Term, View, Weight

_WIDE = {1: "f32", 10: "f16", 11: "f64", 16: "bf16"}


def _placeholder(shape: Sequence[int]) -> Array:
    """An array of that shape without memory: to see what a movement does with the shape."""
    return np.broadcast_to(np.zeros((), np.int8), tuple(shape))


def _move(call: Call, view: View, move: Callable[[Array], Array]) -> View:
    return view.moved(move(_placeholder(view.shape)).shape, move)


def reshape(call: Call) -> Outputs:
    value, wanted = call.inputs[0], [int(dim) for dim in call.known(1).reshape(-1)]
    allow_zero = bool(call.attribute("allowzero", 0))
    if isinstance(value, Weight):
        return [value.reshaped(numeric.reshape_to(value.shape, wanted, allow_zero))]
    if isinstance(value, View):
        return [value.reshaped(numeric.reshape_to(value.shape, wanted, allow_zero))]
    return []


def flatten(call: Call) -> Outputs:
    view = call.view(0)
    axis = call.attribute("axis", 1) % max(1, len(view.shape))
    rows = int(np.prod(view.shape[:axis]))
    return [view.reshaped((rows, int(np.prod(view.shape[axis:]))))]


def unsqueeze(call: Call) -> Outputs:
    axes = numeric.axes_of(_maybe(call, 1), call.node.attributes) or []
    value = call.inputs[0]
    if isinstance(value, Weight | View):
        return [value.reshaped(numeric.unsqueezed(value.shape, axes))]
    return []


def squeeze(call: Call) -> Outputs:
    axes = numeric.axes_of(_maybe(call, 1), call.node.attributes)
    value = call.inputs[0]
    if isinstance(value, Weight | View):
        return [value.reshaped(numeric.squeezed(value.shape, axes))]
    return []


def _maybe(call: Call, at: int) -> Array | None:
    return None if call.optional(at) is None else call.known(at)


def transpose(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View | Weight | Quantized | Centres):
        return []
    order = tuple(call.attribute("perm") or reversed(range(len(value.shape))))
    if sorted(order) != list(range(len(value.shape))):
        raise call.unsupported(f"perm {order} of shape {value.shape}")
    if isinstance(value, View):
        return [_move(call, value, lambda array: array.transpose(order))]
    if isinstance(value, Weight):
        return [value.transposed(order)]
    return [value.transposed() if order == (1, 0) else value]


def slice_(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View):
        return []
    if len(call.inputs) > 1:
        given = [call.known(1), call.known(2), _maybe(call, 3), _maybe(call, 4)]
    else:  # before opset 10
        axes = call.attribute("axes")
        given = [np.array(call.attribute("starts")), np.array(call.attribute("ends")), None, None]
        given[2] = None if axes is None else np.array(axes)
    starts, ends = given[0], given[1]
    taken = numeric.slices(value.shape, starts, ends, given[2], given[3])
    return [_move(call, value, lambda array: array[taken])]


def _taker(part: tuple[slice, ...]) -> Callable[[Array], Array]:
    return lambda array: array[part]


def split(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View | Weight):
        return []
    axis = numeric.positive_axis(call.attribute("axis", 0), len(value.shape))
    attributes = call.node.attributes
    sizes = numeric.split_sizes(value.shape[axis], _maybe(call, 1), attributes, len(call.node.outputs))
    ends = np.cumsum(sizes).tolist()
    begins = [end - size for end, size in zip(ends, sizes, strict=True)]
    if isinstance(value, View):
        lead: tuple[slice, ...] = (slice(None),) * axis
        parts = [(*lead, slice(begin, end)) for begin, end in zip(begins, ends, strict=True)]
        return [_move(call, value, _taker(part)) for part in parts]
    if axis == 0:
        return [value.rows(begin, end) for begin, end in zip(begins, ends, strict=True)]
    if axis == 1 and len(value.shape) == 2:
        return [value.columns(begin, end) for begin, end in zip(begins, ends, strict=True)]
    return []


def expand(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View):
        return []
    shape = numeric.bounded(np.broadcast_shapes(value.shape, tuple(int(dim) for dim in call.known(1))))
    return [value.moved(shape, lambda array: np.broadcast_to(array, shape))]


def tile(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View):
        return []
    repeats = [int(count) for count in call.known(1).reshape(-1)]
    shape = numeric.bounded([dim * count for dim, count in zip(value.shape, repeats, strict=True)])
    return [value.moved(shape, lambda array: np.tile(array, repeats))]


def cast(call: Call) -> Outputs:
    value, to = call.inputs[0], call.attribute("to")
    if isinstance(value, View):
        if to not in _WIDE:
            raise call.unsupported("activations become integers")
        return [value]
    if isinstance(value, Weight) and to in _WIDE and value.element in ("f32", "f16", "bf16"):
        return [_cast_weight(value, _WIDE[to])]
    if isinstance(value, Quantized):
        return [value]
    return []


def _cast_weight(value: Weight, to: str) -> Weight:
    """Wider types keep the file's bits, which say the same; narrower ones round."""
    if to in (value.element, "f32", "f64"):
        return value
    from nybble.checkpoint.encodings import ENCODINGS
    from nybble.formats.onnx.external_data import STORAGE

    def load() -> Array:
        quantize = ENCODINGS[to].quantize
        assert quantize is not None
        flat = np.ascontiguousarray(value.load()).reshape(-1).view(np.uint8)
        rounded = quantize(ENCODINGS[value.element].dequantize(flat))
        return rounded.view(STORAGE[to]).reshape(value.shape)

    return Weight(value.shape, to, load, ("cast", to, *value.key), False)


def identity(call: Call) -> Outputs:
    return [call.inputs[0]]


def shape(call: Call) -> Outputs:
    value = call.inputs[0]
    if value is None:
        raise call.unsupported("an input is missing")
    dims = value.array.shape if isinstance(value, Known) else value.shape
    start, end = call.attribute("start", 0), call.attribute("end")
    return [Known(np.array(dims[start:end], np.int64))]


def size(call: Call) -> Outputs:
    value = call.inputs[0]
    if value is None:
        raise call.unsupported("an input is missing")
    dims = value.array.shape if isinstance(value, Known) else value.shape
    return [Known(np.array(np.prod(dims, dtype=np.int64)))]


def gather(call: Call) -> Outputs:
    """Rows of a matrix by token id are the embedding; rows by known numbers are moved elements."""
    data, index = call.inputs[0], call.inputs[1]
    axis = call.attribute("axis", 0)
    if isinstance(index, View):
        if index.base.operator != "input_ids" or not index.is_whole or index.gain != 1.0:
            raise call.unsupported("indices that are no token ids")
        if isinstance(data, Centres):
            return [minima.rows_by_id(call, data, index)]
        if not isinstance(data, Weight | Quantized) or len(data.shape) != 2 or axis:
            raise call.unsupported("an embedding that is no stored matrix")
        return [embedding(call, data, index)]
    if not isinstance(data, View):
        return []
    numbers = call.known(1).astype(np.int64)
    axis = numeric.positive_axis(axis, len(data.shape))
    found = data.shape[axis]
    if numbers.size and not (-found <= numbers.min() and numbers.max() < found):
        raise call.unsupported(f"indices {numbers.min()} to {numbers.max()} of {found}")
    result = (*data.shape[:axis], *numbers.shape, *data.shape[axis + 1 :])
    return [data.moved(numeric.bounded(result), lambda array: np.take(array, numbers, axis=axis))]


def embedding(call: Call, weight: Weight | Quantized, ids: View) -> View:
    """Rows of ``weight`` (vocab_size, hidden_size) by token id."""
    width = weight.shape[1]
    term = call.term("embedding", (), (1, call.probe.tokens, width), weight=weight)
    return View(term, (*ids.shape, width))


def concat(call: Call) -> Outputs:
    """Pieces of one term put together (rotary), or cached and new keys."""
    views = [value for value in call.inputs if isinstance(value, View)]
    if not views:
        return []
    if len(views) < len(call.inputs):
        views = [_filled(call, value, views[0]) for value in call.inputs]
    axis = numeric.positive_axis(call.attribute("axis"), len(views[0].shape))
    first = views[0]
    if first.base.operator == "past" and len(views) == 2 and first.is_whole:
        return [_cache(call, first, views[1], axis)]
    if any(view.base is not first.base for view in views):
        raise call.unsupported("it joins activations of different origin")
    sizes = [view.shape[axis] for view in views]
    result = list(first.shape)
    result[axis] = sum(sizes)

    def make() -> list[tuple[Array, Array | None]]:
        count = max(len(view.parts) for view in views)
        plain = count == 1 and all(view.parts[0][1] is None and view.gain == first.gain for view in views)
        if plain:
            return [(np.concatenate([view.parts[0][0] for view in views], axis=axis), None)]
        joined: list[tuple[Array, Array | None]] = []
        for at in range(count):
            indices, factors = [], []
            for view in views:
                index, factor = view.parts[min(at, len(view.parts) - 1)]
                if at >= len(view.parts):
                    factor = np.zeros(())
                times = 1.0 if factor is None else factor
                indices.append(np.broadcast_to(index, view.shape))
                factors.append(np.broadcast_to(np.asarray(times) * view.gain, view.shape))
            joined.append((np.concatenate(indices, axis=axis), np.concatenate(factors, axis=axis)))
        return joined

    same = all(view.gain == first.gain for view in views) and all(len(view.parts) == 1 for view in views)
    keep = same and all(view.parts[0][1] is None for view in views)
    sources = tuple(name for view in views for name in view.sources)
    return [View(first.base, tuple(result), make, first.gain if keep else 1.0, sources)]


def _filled(call: Call, value: object, like: View) -> View:
    """An empty known array among activations is nothing; anything else is not understood."""
    if isinstance(value, View):
        return value
    raise call.unsupported("it joins activations with constants")


def _cache(call: Call, past: View, new: View, axis: int) -> View:
    heads = heads_of(new, call.probe.tokens)
    if axis != 2 or len(past.shape) != 4:
        raise call.unsupported("cached and new keys are joined along an axis that is not the tokens'")
    shape = (1, heads.heads, call.probe.total, heads.head_dim)
    if past.shape[1:] != (heads.heads, call.probe.past, heads.head_dim):
        raise call.unsupported(f"cached keys of shape {past.shape} and new ones of {new.shape}")
    term = Term("cache", (past.base, heads.term), shape, call.node.title, {"heads": heads})
    return View(term, shape)


__all__ = ["RULES", "embedding"]

RULES: Mapping[tuple[str, str], Rule] = {
    ("", "Reshape"): reshape,
    ("", "Flatten"): flatten,
    ("", "Unsqueeze"): unsqueeze,
    ("", "Squeeze"): squeeze,
    ("", "Transpose"): transpose,
    ("", "Slice"): slice_,
    ("", "Split"): split,
    ("", "Expand"): expand,
    ("", "Tile"): tile,
    ("", "Cast"): cast,
    ("", "Identity"): identity,
    ("", "Shape"): shape,
    ("", "Size"): size,
    ("", "Gather"): gather,
    ("", "Concat"): concat,
}
