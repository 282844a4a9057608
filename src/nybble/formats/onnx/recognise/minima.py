"""Reads back weights with a minimum in each group: a product with symmetric codes, and one of block sums.

``graph/onnx/minima.py`` says how they are written. The centres (minimum + middle * scale) are nodes on
stored arrays; here they become one made-up node that keeps these arrays apart, so that nothing is computed
and the minima are found again as they are. Where a graph is only similar, nothing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nybble.errors import FormatError
from nybble.formats.onnx.recognise import numeric
from nybble.formats.onnx.recognise.layout import features_of
from nybble.formats.onnx.recognise.probe import Call, GraphTable, Node, Outputs, Rule
from nybble.formats.onnx.recognise.values import Array, Centres, Quantized, Term, View, Weight

_DOMAIN, _OPERATOR = "nybble", "Centres"
_FLOATS = ("f32", "f16", "bf16")


def mark_centres(table: GraphTable) -> None:
    """Gives each Add of stored minima and scaled scales, which sums or token ids meet, that one node."""
    readers: dict[str, list[Node]] = {}
    for node in table.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    for node in table.nodes:
        arrays = _arrays_of_centres(table, node)
        if arrays is not None and _meets_sums_or_ids(table, readers, node.outputs):
            node.operator, node.domain, node.inputs = _OPERATOR, _DOMAIN, arrays


def _maker(table: GraphTable, name: str, operator: str) -> Node | None:
    at = table.makers.get(name)
    node = None if at is None else table.nodes[at]
    return node if node is not None and (node.domain, node.operator) == ("", operator) else None


def _arrays_of_centres(table: GraphTable, node: Node) -> list[str] | None:
    """Names of minima, scales and middle, where a node is Add(minima, Mul(scales, middle))."""
    if (node.domain, node.operator) != ("", "Add") or len(node.inputs) != 2 or len(node.outputs) != 1:
        return None
    product = _maker(table, node.inputs[1], "Mul")
    if product is None or len(product.inputs) != 2:
        return None
    names = [node.inputs[0], *product.inputs]
    stored = [table.stored.get(name) for name in names]
    minima, scales, middle = stored
    if minima is None or scales is None or middle is None:
        return None
    same = minima.shape == scales.shape and minima.element == scales.element
    if not same or len(minima.shape) != 2 or minima.element not in _FLOATS or middle.size != 1:
        return None
    return names


def _meets_sums_or_ids(
    table: GraphTable, readers: Mapping[str, list[Node]], names: list[str], *, turned: bool = False
) -> bool:
    """Whether all that read centres, turned once or not, are products with sums or rows by token id."""
    found = [node for name in names for node in readers.get(name, [])]
    for node in found:
        kind = (node.domain, node.operator)
        if kind == ("", "Transpose") and not turned:
            if not _meets_sums_or_ids(table, readers, node.outputs, turned=True):
                return False
        elif kind == ("", "MatMul"):
            if node.inputs[1:] != names or _maker(table, node.inputs[0], "ReduceSum") is None:
                return False
        elif kind != ("", "Gather") or node.inputs[:1] != names or node.inputs[1:] == names:
            return False
    return bool(found)


# -- rules ---------------------------------------------------------------------------------------------


def centres(call: Call) -> Outputs:
    """The made-up node of ``mark_centres``."""
    middle = float(call.known(2).reshape(-1)[0])
    if not middle.is_integer() or not 0 <= middle <= 255:
        raise call.unsupported(f"{middle} in the middle of integer codes")
    return [Centres(call.weight(0), call.weight(1), int(middle))]


def reduce_sum(call: Call) -> Outputs:
    """Sums over blocks of neighbouring features: the last axis of (batch, tokens, blocks, size)."""
    if not isinstance(call.inputs[0], View):
        return []
    call.allow("axes", "keepdims", "noop_with_empty_axes")
    view = call.view(0)
    axes = numeric.axes_of(None if call.optional(1) is None else call.known(1), call.node.attributes)
    if axes not in ([-1], [3]) or len(view.shape) != 4 or call.attribute("keepdims", 1):
        raise call.unsupported("a sum of activations that is not over blocks of features")
    *lead, blocks, size = view.shape
    x = features_of(view.reshaped((*lead, blocks * size)))
    if x.width != blocks * size:
        raise call.unsupported("a sum over blocks of a part of the features")
    return [View(call.term("block_sums", (x,), (*x.shape[:-1], blocks), size=size), (*lead, blocks))]


def product(call: Call, sums: View, found: Centres) -> View:
    """Block sums times centres (blocks, rows)."""
    base = sums.base
    if base.operator != "block_sums" or not sums.is_whole or sums.gain != 1.0 or base.width != found.shape[0]:
        raise call.unsupported("centres of blocks meet something else than sums over blocks")
    rows = found.shape[1]
    values = {"centres": found, "size": base.values["size"]}
    term = call.term("centre_product", base.args, (*base.shape[:-1], rows), **values)
    return View(term, (*sums.shape[:-1], rows))


def rows_by_id(call: Call, found: Centres, ids: View) -> View:
    """Columns of centres (blocks, rows) by token id: (blocks, batch, tokens)."""
    if call.attribute("axis", 0) != 1 or ids.base.operator != "input_ids" or not ids.is_whole:
        raise call.unsupported("centres of blocks that are not gathered by token id")
    blocks = found.shape[0]
    term = call.term("centre_rows", (), (1, call.probe.tokens, blocks), centres=found)
    view = View(term, (*ids.shape, blocks))
    return view.moved((blocks, *ids.shape), lambda array: np.moveaxis(array, -1, 0))


def combined(call: Call, a: View, b: View) -> View | None:
    """The sum of symmetric codes' part and minima's part as one; None where the two are no such parts."""
    for view, part in ((a, b), (b, a)):
        if not (view.is_whole and part.is_whole and view.gain == part.gain == 1.0):
            continue
        found = _linear(call, view, part) or _embedding(call, view, part)
        if found is not None:
            return found
    return None


def _linear(call: Call, view: View, part: View) -> View | None:
    base, other = view.base, part.base
    if (base.operator, other.operator) != ("linear", "centre_product") or view.shape != part.shape:
        return None
    if base.values["bias"] is not None or "order" in base.values or base.args[0] is not other.args[0]:
        return None
    weight = _with_minima(base.values["weight"], other.values["centres"], other.values["size"])
    if weight is None:
        return None
    values = {**base.values, "weight": weight}
    return View(Term("linear", base.args, base.shape, call.node.title, values), view.shape)


def _embedding(call: Call, view: View, part: View) -> View | None:
    base, other = view.base, part.base
    if (base.operator, other.operator) != ("embedding", "centre_rows"):
        return None
    if len(view.shape) != 4 or part.shape != (*view.shape[:-1], 1):
        return None
    weight = _with_minima(base.values["weight"], other.values["centres"], view.shape[-1])
    if weight is None:
        return None
    return View(call.term("embedding", (), base.shape, weight=weight), view.shape)


def _with_minima(weight: object, found: Centres, size: int) -> Quantized | None:
    """A symmetric matrix and centres (blocks, rows) of the same scales as a matrix with minima."""
    if not isinstance(weight, Quantized) or weight.zero_points is not None or weight.minima is not None:
        return None
    rows, columns = weight.shape
    if weight.axis != 1 or weight.group_size != size or found.shape != (columns // size, rows):
        return None
    turned = weight.key[0] == "T"
    key = weight.key[1:] if turned else weight.key
    scales, scales_turned = found.scales, found.scales.key[0] == "transposed"
    if scales_turned:
        original = scales.key[1]
        assert isinstance(original, Weight)
        scales = original
    if key[0] not in ("blocks", "linear") or key[2] != scales.key or turned == scales_turned:
        return None
    shift = 2 ** (weight.bits - 1) - found.middle
    if shift < 0 or found.minima.element != weight.scale:
        return None

    def codes() -> Array:
        stored = weight.codes()
        if not shift:
            return stored
        if stored.min(initial=255) < shift:
            raise FormatError(f"a quantized matrix with codes below {shift} and {found.middle} in the middle")
        return np.asarray(stored - np.uint8(shift))

    minima = found.minima.transposed((1, 0))
    return replace(
        weight,
        codes=codes,
        minima=minima.load,
        key=("minima", minima.key, found.middle, *weight.key),
        packed=None if shift else weight.packed,
    )


RULES: Mapping[tuple[str, str], Rule] = {
    (_DOMAIN, _OPERATOR): centres,
    ("", "ReduceSum"): reduce_sum,
}
