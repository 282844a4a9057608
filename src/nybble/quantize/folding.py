"""Which input features may be scaled, and where the inverse goes: the plan for AWQ, from the graph.

Scaling the columns of linears by s changes nothing if their common input is divided by s. What makes
that input can take the division in its own weights where it acts on each feature alone:

=====================  ==========================================================
input of the linears   what is divided by s
=====================  ==========================================================
RMS norm               its weight, or with an offset (Gemma): weight + offset
activation(gate) * up  rows of up's matrix and its bias, also inside gate_up_proj
attention              rows of v's matrix and its bias, also inside qkv_proj
=====================  ==========================================================

With grouped-query attention several input features of o_proj come from one row of v: they share a scale.
Nothing else may read the value that is divided, and no matrix may be used twice: a final norm before
tied embeddings cannot be scaled, for the embedding is the output matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.graph.graph import Graph, Node, Value

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NormBefore:
    """The inputs are an RMS norm's outputs."""

    weight: str
    offset: float
    """What is added to the weight before it is used."""


@dataclass(frozen=True)
class RowsBefore:
    """The inputs are, feature by feature, proportional to rows of a linear's output."""

    weight: str
    bias: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class ScaleGroup:
    """Linears with one input, whose features can be scaled."""

    linears: tuple[str, ...]
    """Names of their weights, (out_features, in_features) each."""
    before: NormBefore | RowsBefore
    source: npt.NDArray[np.int64]
    """(in_features,): which element or row of ``before`` makes each input feature; two that come from
    the same one share their scale."""

    @property
    def scales(self) -> int:
        """How many scales there are to choose."""
        return int(self.source.max()) + 1


@dataclass(frozen=True)
class FoldingPlan:
    """All linears of a model."""

    groups: tuple[ScaleGroup, ...]
    """In the order of the graph."""
    unscaled: Mapping[str, str]
    """Weights of the other linears, and why they cannot be scaled."""


def plan_folding(graph: Graph) -> FoldingPlan:
    """What can be scaled in a model."""
    return _Planner(graph).plan()


def fold(group: ScaleGroup, scales: Floats, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that change when a group is scaled: float32, by name.

    The model with them computes what it did before, up to rounding in float32.

    Args:
        group: of the plan.
        scales: (group.scales,), above 0: input feature i is divided, and columns i of the linears are
            multiplied, by scales[group.source[i]].
        tensors: the model's.

    Raises:
        ValueError: another number of scales, or one that is not a finite number above 0.
    """
    if scales.shape != (group.scales,):
        raise ValueError(f"{scales.shape} scales for {group.linears[0]}, which has {group.scales}")
    if not np.isfinite(scales).all() or scales.min() <= 0:
        raise ValueError(f"{group.linears[0]}: scales must be finite and above 0")
    changed: dict[str, Floats] = {}
    for name in group.linears:
        changed[name] = tensors[name].dequantize() * scales[group.source]
    before = group.before
    if isinstance(before, NormBefore):
        used = tensors[before.weight].dequantize() + np.float32(before.offset)
        changed[before.weight] = used / scales - np.float32(before.offset)
    else:
        rows = slice(before.start, before.stop)
        # The same matrix may be scaled twice: its rows here, its columns as a member of a group.
        changed[before.weight] = tensors[before.weight].dequantize()
        changed[before.weight][rows] /= scales[:, None]
        if before.bias is not None:
            changed[before.bias] = tensors[before.bias].dequantize()
            changed[before.bias][rows] /= scales
    return {name: _float32(tensors[name], values) for name, values in changed.items()}


def _float32(tensor: Tensor, values: Floats) -> Tensor:
    data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    return tensor.changed(encoding=encoding("f32"), data=data)


class _Refused(Exception):
    """Why an input cannot be scaled."""


class _Planner:
    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.nodes
        self._maker = {value.index: node for node in graph.nodes for value in node.outputs}
        self._readers: dict[int, list[Node]] = {}
        self._uses: dict[str, int] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self._readers.setdefault(value.index, []).append(node)
            for name in node.weights:
                self._uses[name] = self._uses.get(name, 0) + 1
        self._output = graph.output.index

    def plan(self) -> FoldingPlan:
        groups: list[ScaleGroup] = []
        unscaled: dict[str, str] = {}
        seen: set[int] = set()
        for node in self._nodes:
            if node.operator != "linear" or node.inputs[0].index in seen:
                continue
            x = node.inputs[0]
            seen.add(x.index)
            linears = [reader for reader in self._readers[x.index] if reader.operator == "linear"]
            names = tuple(linear.weights[0] for linear in linears)
            try:
                self._only_linears(x)
                before, source = self._before(x)
            except _Refused as refused:
                unscaled.update(dict.fromkeys(names, str(refused)))
            else:
                groups.append(ScaleGroup(names, before, source))
        return FoldingPlan(tuple(groups), unscaled)

    def _only_linears(self, x: Value) -> None:
        for reader in self._readers[x.index]:
            if reader.operator != "linear":
                raise _Refused(f"its input is also read by {reader.operator}")
            self._used_once(reader.weights[0])

    def _used_once(self, name: str) -> None:
        if self._uses[name] > 1:
            raise _Refused(f"{name} is used in {self._uses[name]} places")

    def _before(self, x: Value) -> tuple[NormBefore | RowsBefore, npt.NDArray[np.int64]]:
        node = self._made_by(x)
        while node.operator == "select_rows":  # picks tokens, and leaves features as they are
            x = node.inputs[0]
            self._only_reader(x)
            node = self._made_by(x)
        features = np.arange(x.width)
        if node.operator == "rms_norm" and node.attributes["group"] == x.width:
            self._used_once(node.weights[0])
            return NormBefore(node.weights[0], float(node.attributes["offset"])), features
        if node.operator == "gated_activation":
            return self._rows_of(node.inputs[1]), features
        if node.operator == "attention":
            q, _, v = node.inputs
            size = int(node.attributes["head_dim"])
            queries_a_key = q.width // v.width
            return self._rows_of(v), features // size // queries_a_key * size + features % size
        raise _Refused(f"its input is made by {node.operator}")

    def _rows_of(self, value: Value) -> RowsBefore:
        """The linear, or part of one, that makes a value."""
        self._only_reader(value)
        node, start = self._made_by(value), 0
        if node.operator == "split":
            start = sum(part.width for part in node.outputs[: node.outputs.index(value)])
            self._only_reader(node.inputs[0])
            node = self._made_by(node.inputs[0])
        if node.operator != "linear":
            raise _Refused(f"its input is computed from what {node.operator} makes")
        self._used_once(node.weights[0])
        bias = node.weights[1] if len(node.weights) > 1 else None
        return RowsBefore(node.weights[0], bias, start, start + value.width)

    def _made_by(self, value: Value) -> Node:
        return self._maker[value.index]

    def _only_reader(self, value: Value) -> None:
        if len(self._readers.get(value.index, ())) != 1 or value.index == self._output:
            raise _Refused("what makes its input is read elsewhere too")
