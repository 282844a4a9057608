"""Rules for arithmetic on activations: sums, products, norms that are spelled out, attention that is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise import elementwise, minima
from nybble.formats.onnx.recognise.layout import (
    Heads,
    features_of,
    head_rows,
    heads_of,
    narrowed,
    order_of_features,
)
from nybble.formats.onnx.recognise.probe import Call, Outputs, Rule
from nybble.formats.onnx.recognise.values import Array, Centres, Known, Quantized, Term, Value, View, Weight

MASKED = -1e4
"""Additions at or below this hide a key."""


def pushed(call: Call, view: View, operator: str, factor: float | None = None) -> View:
    """A function of each element: of the whole base, looked at in the same way."""
    if len(view.parts) != 1 or view.parts[0][1] is not None:
        raise call.unsupported("a function of sums of elements")
    view = narrowed(view)
    base = view.base.scaled(view.gain)
    values = {} if factor is None else {"factor": factor}
    return view.on(call.term(operator, (base,), base.shape, **values))


def unary(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View):
        return []
    if call.node.operator == "Neg":
        return [value.scaled(-1.0)]
    return [pushed(call, value, call.node.operator)]


def gelu(call: Call) -> Outputs:
    call.allow("approximate")
    tanh = call.attribute("approximate", "none") == "tanh"
    return [pushed(call, call.view(0), "gelu_pytorch_tanh" if tanh else "gelu")]


def quick_gelu(call: Call) -> Outputs:
    if call.attribute("alpha", 1.702) != 1.0:
        raise call.unsupported("an alpha other than 1 is no activation that nybble has")
    return [pushed(call, call.view(0), "silu")]


def binary(call: Call) -> Outputs:
    """Add, Sub, Mul, Div and Pow with at least one activation."""
    a, b = call.inputs[0], call.inputs[1]
    operator = call.node.operator
    if a is None or b is None or not (isinstance(a, View) or isinstance(b, View)):
        return []
    if isinstance(a, View) and isinstance(b, View):
        return [_two(call, operator, a, b)]
    if isinstance(a, View):
        assert b is not None
        return [_with_constant(call, operator, a, b, right=True)]
    assert isinstance(b, View)
    return [_with_constant(call, operator, b, a, right=False)]


def _with_constant(call: Call, operator: str, view: View, other: Value, *, right: bool) -> View:
    if isinstance(other, Quantized | Centres):
        raise call.unsupported("arithmetic with a quantized constant")
    if isinstance(other, View):
        raise call.unsupported("two activations where one is expected")
    size = other.array.size if isinstance(other, Known) else other.size
    if operator in ("Mul", "Add") and isinstance(other, Weight | Known) and size > 1:
        found = _vector(call, operator, view, other)
        if found is not None:
            return found
    array = call.probe.known(other, call)
    if array.size and (array == array.reshape(-1)[0]).all() and array.ndim <= len(view.shape):
        shape = np.broadcast_shapes(view.shape, array.shape)
        if shape == view.shape:
            return _with_number(call, operator, view, float(array.reshape(-1)[0]), right)
    name = call.node.inputs[1 if right else 0]
    if operator == "Mul":
        return view.weighted(array.astype(np.float64), np.broadcast_shapes(view.shape, array.shape), name)
    if operator == "Div" and right:
        with np.errstate(all="ignore"):
            factors = 1.0 / array.astype(np.float64)
        return view.weighted(factors, np.broadcast_shapes(view.shape, array.shape), name)
    if operator == "Add":
        return _masked(call, view, 1 if right else 0)
    raise call.unsupported("arithmetic of an activation with an array")


def _vector(call: Call, operator: str, view: View, other: Weight | Known) -> View | None:
    """Weight of a norm, or bias of a linear."""
    shape = other.array.shape if isinstance(other, Known) else other.shape
    width = view.shape[-1]
    if shape[-1] != width or any(dim != 1 for dim in shape[:-1]) or len(shape) > len(view.shape):
        return None
    weight = call.weight(0 if other is call.inputs[0] else 1).reshaped((width,))
    base = view.base
    if operator == "Mul" and base.operator == "normal" and base.values["group"] == width:
        values = {**base.values, "weight": weight}
        return view.on(Term("rms_norm", base.args, base.shape, call.node.title, values))
    if operator == "Add" and base.operator == "linear" and base.values.get("bias") is None and view.is_whole:
        if base.width != width:
            raise call.unsupported("a bias on a part of a projection")
        values = {**base.values, "bias": weight}
        return view.on(Term("linear", base.args, base.shape, base.node, values))
    return None


def _with_number(call: Call, operator: str, view: View, number: float, right: bool) -> View:
    if operator == "Mul":
        return view.scaled(number)
    if operator == "Div" and right:
        return view.scaled(1.0 / number if number else float("inf"))
    if operator == "Div":
        return pushed(call, view, "over", number)
    if operator == "Add" or (operator == "Sub" and right):
        moved = number if operator == "Add" else -number
        return view if moved == 0 else pushed(call, view, "shift", moved)
    if operator == "Sub":
        return pushed(call, view.scaled(-1.0), "shift", number)
    if operator == "Pow" and right:
        return pushed(call, view, "power", number)
    raise call.unsupported("a number to the power of an activation")


def _two(call: Call, operator: str, a: View, b: View) -> View:
    if operator == "Pow":
        raise call.unsupported("an activation to the power of an activation")
    shape = np.broadcast_shapes(a.shape, b.shape)
    found = minima.combined(call, a, b) if operator == "Add" else None
    if found is not None:
        return found
    if operator in ("Add", "Sub") and a.base is b.base and (_turned(a) or _turned(b)):
        return _sum_of_parts(a, b.scaled(-1.0) if operator == "Sub" else b, shape)
    name = operator.lower()
    left, right, index = _aligned(call, a, b, shape)
    term = _recognised(call.term(name, (left, right), left.shape))
    return View(term, shape, None if index is None else lambda: [(index, None)])


def _turned(view: View) -> bool:
    return len(view.parts) > 1 or view.parts[0][1] is not None


def _sum_of_parts(a: View, b: View, shape: tuple[int, ...]) -> View:
    """Elements times cos plus other elements times sin."""

    def parts(view: View, gain: float) -> list[tuple[Array, Array | None]]:
        return [
            (
                np.broadcast_to(index, shape),
                np.broadcast_to(gain * np.asarray(1 if factor is None else factor), shape),
            )
            for index, factor in view.parts
        ]

    sources = (*a.sources, *b.sources)
    return View(a.base, shape, lambda: parts(a, 1.0) + parts(b, b.gain / a.gain), a.gain, sources)


def _aligned(call: Call, a: View, b: View, shape: tuple[int, ...]) -> tuple[Term, Term, Array | None]:
    """Two terms of the same canonical shape, element beside element, and how to look at the result."""
    if a.is_whole and b.is_whole and a.base.shape == b.base.shape and a.shape == b.shape:
        return _scaled(a), _scaled(b), None
    if shape in (a.shape, b.shape):
        full, part = (a, b) if a.shape == shape else (b, a)
        spread = _spread(call, full, part, shape)
        if spread is not None:
            terms = (_scaled(full), spread)
            index = full.parts[0][0]
            return (*(terms if full is a else terms[::-1]), index)
    left, right = features_of(a), features_of(b)
    if left.shape == right.shape and a.shape == b.shape:
        return left, right, None
    raise call.unsupported(f"activations of shapes {a.shape} and {b.shape} that do not lie alike")


def _scaled(view: View) -> Term:
    return view.base.scaled(view.gain)


def _spread(call: Call, full: View, part: View, shape: tuple[int, ...]) -> Term | None:
    """The part's term repeated over groups of the full one's elements, where it lies so."""
    if _turned(full) or _turned(part):
        return None
    index = full.parts[0][0]
    other = np.broadcast_to(part.parts[0][0], shape)
    sizes = int(np.prod(full.base.shape)), int(np.prod(part.base.shape))
    if sizes[0] % sizes[1] or (other != index // (sizes[0] // sizes[1])).any():
        return None
    if sizes[0] == sizes[1]:
        return _scaled(part)
    return call.term("spread", (_scaled(part),), full.base.shape)


def _recognised(term: Term) -> Term:
    """A product with the inverse root of its own mean square is a norm without weight."""
    if term.operator not in ("mul", "div"):
        return term
    for x in term.args:
        for mean in elementwise.leaves(term.args[1 if x is term.args[0] else 0]):
            if mean.operator != "mean" or not elementwise.is_square(mean.args[0], x):
                continue
            eps = elementwise.epsilon_of(term, x, mean)
            if eps is not None:
                return Term("normal", (x,), x.shape, term.node, {"eps": eps, "group": mean.values["group"]})
    return term


def reduce_mean(call: Call) -> Outputs:
    """The mean over the last axis, which is a whole number of heads or everything."""
    from nybble.formats.onnx.recognise.numeric import axes_of

    if not isinstance(call.inputs[0], View):
        return []
    view = narrowed(call.view(0))
    axes = axes_of(None if call.optional(1) is None else call.known(1), call.node.attributes)
    if axes not in ([-1], [len(view.shape) - 1]) or not call.attribute("keepdims", 1):
        raise call.unsupported("a mean over anything but the last axis")
    first, group = head_rows(view)
    shape = (*view.base.shape[:-1], view.base.width // group)
    base = _scaled(view)
    term = call.term("mean", (base,), shape, group=group)
    return [View(term, (*view.shape[:-1], 1), lambda: [(first // group, None)])]


def reduce_sum_square(call: Call) -> Outputs:
    raise call.unsupported("a sum of activations")


# -- linears and attention ----------------------------------------------------------------------------


def matmul(call: Call) -> Outputs:
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, View) and isinstance(b, Weight | Quantized):
        if len(b.shape) != 2:
            raise call.unsupported(f"a weight of shape {b.shape}")
        weight = b.transposed((1, 0)) if isinstance(b, Weight) else b.transposed()
        return [linear(call, a, weight, None)]
    if isinstance(a, View) and isinstance(b, Centres):
        return [minima.product(call, a, b)]
    if isinstance(a, View) and isinstance(b, View):
        if a.base.operator == "probabilities":
            return [_attend(call, a, b)]
        return [_scores(call, a, b)]
    return []


def gemm(call: Call) -> Outputs:
    call.allow("alpha", "beta", "transA", "transB")
    if not isinstance(call.inputs[0], View):
        return []
    weight = call.inputs[1]
    if (
        call.attribute("alpha", 1.0) != 1.0
        or call.attribute("beta", 1.0) != 1.0
        or call.attribute("transA", 0)
    ):
        raise call.unsupported("alpha, beta or transA")
    if not isinstance(weight, Weight | Quantized) or len(weight.shape) != 2:
        raise call.unsupported("a weight that is not stored")
    if not call.attribute("transB", 0):
        weight = weight.transposed((1, 0)) if isinstance(weight, Weight) else weight.transposed()
    bias = None if call.optional(2) is None else call.weight(2).reshaped((weight.shape[0],))
    return [linear(call, call.view(0), weight, bias)]


def linear(call: Call, view: View, weight: Weight | Quantized, bias: Weight | None) -> View:
    """view @ weight.T + bias; weight (out_features, in_features)."""
    order = order_of_features(view)
    term = features_of(view) if order is None else view.base.scaled(view.gain)
    rows, columns = weight.shape
    if view.shape[-1] != columns or term.width != columns:
        raise call.unsupported(f"{view.shape[-1]} features meet a weight with {columns}")
    values = {"weight": weight, "bias": bias, "accuracy_level": call.attribute("accuracy_level", 0)}
    if order is not None:
        values["order"] = order
    made = call.term("linear", (term,), (*term.shape[:-1], rows), **values)
    return View(made, (*view.shape[:-1], rows))


def keys_of(call: Call, view: View) -> Heads:
    """Keys or values (1, heads, total, head_dim) with or without a cache, heads repeated or not."""
    base = view.base
    if base.operator != "cache":
        return heads_of(view, call.probe.tokens, shared=True)
    held: Heads = base.values["heads"]
    heads = int(np.prod(view.shape[:-2]))
    grid = (heads, call.probe.total, held.head_dim)
    wanted = np.arange(int(np.prod(base.shape))).reshape(base.shape[1:])
    if heads % held.heads or _turned(view) or view.shape[-2:] != grid[1:]:
        raise call.unsupported("keys in an order that is not understood")
    if (view.parts[0][0].reshape(grid) != np.repeat(wanted, heads // held.heads, axis=0)).any():
        raise call.unsupported("keys in an order that is not understood")
    return Heads(held.term, held.heads, held.head_dim, view.gain * held.gain, held.pairs)


def _scores(call: Call, q: View, k: View) -> View:
    order = (*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2)
    keys_view = k.moved(tuple(k.shape[axis] for axis in order), lambda array: array.transpose(order))
    queries = heads_of(q, call.probe.tokens)
    keys = keys_of(call, keys_view)
    cache = k.base if k.base.operator == "cache" else None
    shape = (1, queries.heads, call.probe.tokens, k.shape[-1])
    values = {"q": queries, "k": keys, "cache": cache, "query": call.node.inputs[0]}
    term = call.term("scores", (queries.term, keys.term), shape, **values)
    return View(term, (*q.shape[:-1], k.shape[-1]), None, queries.gain * keys.gain)


def _masked(call: Call, view: View, mask_input: int) -> View:
    """Scores plus a mask."""
    scores = [leaf for leaf in elementwise.leaves(view.base) if leaf.operator in ("scores", "masked")]
    if not scores or not view.is_whole:
        raise call.unsupported("an array is added to an activation that is no attention score")
    base = _scaled(view)
    name = call.node.inputs[mask_input]
    return view.on(call.term("masked", (base,), base.shape, mask=name, probe=call.probe))


def where(call: Call) -> Outputs:
    """Scores where a condition holds and very small numbers elsewhere, or a guard against NaN."""
    condition, yes, no = call.inputs[:3]
    if isinstance(condition, View) and condition.base.operator == "is_nan":
        return [no]
    if isinstance(condition, View) or not (isinstance(yes, View) ^ isinstance(no, View)):
        return []
    scores = yes if isinstance(yes, View) else no
    other = no if isinstance(yes, View) else yes
    assert isinstance(scores, View) and other is not None
    filler = call.probe.known(other, call)
    if not (filler <= MASKED).all() or not scores.is_whole:
        raise call.unsupported("activations are replaced by numbers that are no mask")
    base = _scaled(scores)
    mask = call.node.inputs[0]
    values = {"mask": mask, "probe": call.probe, "hidden": scores is no}
    return [scores.on(call.term("masked", (base,), base.shape, **values))]


def is_nan(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View):
        return []
    return [value.on(call.term("is_nan", (value.base,), value.base.shape))]


def softmax(call: Call) -> Outputs:
    value = call.inputs[0]
    if not isinstance(value, View):
        return []
    if call.attribute("axis", -1) not in (-1, len(value.shape) - 1) or not value.is_whole:
        raise call.unsupported("a softmax over anything but the keys")
    masks: list[tuple[str, bool | None]] = []
    term = _scaled(value)
    scale: float = 1.0
    cap: float | None = None
    while True:
        if term.operator == "masked":
            if cap is not None or scale != 1.0:
                raise call.unsupported("scores are scaled after the mask")
            masks.append((term.values["mask"], term.values.get("hidden")))
            term = term.args[0]
            continue
        found = elementwise.cap_of(term)
        if found is None or found[0].operator not in ("scores", "masked"):
            raise call.unsupported("a softmax of something that is no attention score")
        term, scale, cap = found
        if term.operator == "scores":
            break
    values = {"scores": term, "scale": scale, "softcap": cap, "masks": masks}
    return [value.on(call.term("probabilities", (term,), term.shape, **values))]


def _attend(call: Call, weights: View, v: View) -> View:
    tokens = call.probe.tokens
    found = weights.base
    scores: Term = found.values["scores"]
    queries: Heads = scores.values["q"]
    keys: Heads = scores.values["k"]
    values = keys_of(call, v)
    if weights.gain != 1.0 or values.gain != 1.0 or not weights.is_whole or values.pairs is not None:
        raise call.unsupported("attention whose values or weights are scaled")
    if (values.heads, values.head_dim) != (keys.heads, keys.head_dim):
        raise UnsupportedError(
            f"{keys.heads} key heads of {keys.head_dim} and {values.heads} of {values.head_dim}"
        )
    width = queries.heads * queries.head_dim
    term = call.term(
        "attention",
        (queries.term, keys.term, values.term),
        (1, tokens, width),
        heads=queries.heads,
        key_heads=keys.heads,
        head_dim=queries.head_dim,
        scale=found.values["scale"],
        softcap=found.values["softcap"],
        window=None,
        masks=found.values["masks"],
        causal=False,
        query=scores.values["query"],
        query_pairs=queries.pairs,
        key_pairs=keys.pairs,
        caches=(scores.values["cache"], v.base if v.base.operator == "cache" else None),
    )
    return View(
        term,
        v_shape(weights, v),
        lambda: [(by_heads(queries.heads, tokens, queries.head_dim, v_shape(weights, v)), None)],
    )


def v_shape(weights: View, v: View) -> tuple[int, ...]:
    """The shape of probabilities @ values."""
    return (*weights.shape[:-1], v.shape[-1])


def by_heads(heads: int, tokens: int, head_dim: int, shape: tuple[int, ...]) -> Array:
    """Indices of (heads, tokens, head_dim) into (tokens, heads * head_dim), in ``shape``."""
    index = np.arange(tokens * heads * head_dim).reshape(tokens, heads, head_dim)
    return np.asarray(index.transpose(1, 0, 2).reshape(shape))


RULES: Mapping[tuple[str, str], Rule] = {
    **{("", name): binary for name in ("Add", "Sub", "Mul", "Div", "Pow")},
    **{("", name): unary for name in ("Sigmoid", "Tanh", "Erf", "Exp", "Neg", "Sqrt", "Reciprocal", "Abs")},
    ("", "Gelu"): gelu,
    ("com.microsoft", "Gelu"): gelu,
    ("com.microsoft", "FastGelu"): lambda call: [pushed(call, call.view(0), "gelu_pytorch_tanh")],
    ("com.microsoft", "QuickGelu"): quick_gelu,
    ("", "Swish"): lambda call: [pushed(call, call.view(0), "silu")],
    ("", "ReduceMean"): reduce_mean,
    ("", "MatMul"): matmul,
    ("", "Gemm"): gemm,
    ("", "Where"): where,
    ("", "IsNaN"): is_nan,
    ("", "Softmax"): softmax,
}
__all__ = ["RULES", "heads_of"]
