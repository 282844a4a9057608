"""Fusion: from a graph's nodes to the CPU's steps.

What is fused, and why it pays: linears that read the same value (one pass over the activations), a
norm with the linears that read it, a residual add or a gated activation with the linear before it
(no pass over memory, no barrier), norm and rotary of q and k with attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from nybble.checkpoint.config import RopeConfig
from nybble.checkpoint.tensor import Tensor
from nybble.devices.cpu.steps import (
    AttentionStep,
    ElementwiseStep,
    EmbeddingStep,
    GatherColumnsStep,
    HiddenStep,
    LinearPart,
    LinearStep,
    NormStep,
    NormWeights,
    Place,
    ScaleBySequenceStep,
    SelectStep,
    Step,
)
from nybble.errors import UnsupportedError
from nybble.graph.graph import Graph, Node, Value

OUTPUT = -1
"""The storage that is the caller's array of logits."""


class Fuser:
    """Turns one graph into steps. ``widths`` gives each storage's columns afterwards."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        self._graph = graph
        self._tensors = tensors
        self._producer: dict[int, Node] = {}
        self._consumers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for value in node.outputs:
                self._producer[value.index] = node
            for value in node.inputs:
                self._consumers.setdefault(value.index, []).append(node)
        self._places: dict[int, Place] = {}
        self._selected: set[int] = set()
        self._done: set[int] = set()
        self.steps: list[Step] = []
        self.widths: list[int] = []
        self._claim_output()

    def run(self) -> list[Step]:
        """All steps in order."""
        for node in self._graph.nodes:
            if any(value.index in self._selected for value in node.inputs):
                self._selected.update(value.index for value in node.outputs)
            if id(node) in self._done:
                continue
            handler = getattr(self, f"_{node.operator}", None)
            if handler is None:
                raise UnsupportedError(f"the CPU device has no operator {node.operator!r}")
            handler(node)
        return self.steps

    # -- values ----------------------------------------------------------------------------------

    def _claim_output(self) -> None:
        """The logits, and what is only scaled or capped into them, live in the caller's array."""
        value = self._graph.output
        self._places[value.index] = Place(OUTPUT)
        while (node := self._producer[value.index]).operator in ("scale", "softcap"):
            value = node.inputs[0]
            if not self._only_use(value, node):
                break
            self._places[value.index] = Place(OUTPUT)

    def _place(self, value: Value) -> Place:
        place = self._places.get(value.index)
        if place is None:
            self.widths.append(value.width)
            place = Place(len(self.widths) - 1)
            self._places[value.index] = place
        return place

    def _only_use(self, value: Value, node: Node) -> bool:
        users = self._consumers.get(value.index, [])
        return len(users) == 1 and users[0] is node and value.index != self._graph.output.index

    def _single_consumer(self, value: Value) -> Node | None:
        users = self._consumers.get(value.index, [])
        return users[0] if len(users) == 1 and value.index != self._graph.output.index else None

    def _is_selected(self, node: Node) -> bool:
        return any(value.index in self._selected for value in (*node.inputs, *node.outputs))

    def _emit(self, step: Step, *nodes: Node) -> None:
        step.selected = step.selected or any(self._is_selected(node) for node in nodes)
        for node in nodes:
            self._done.add(id(node))
            if step.selected:
                self._selected.update(value.index for value in node.outputs)
        self.steps.append(step)

    # -- operators -------------------------------------------------------------------------------

    def _embedding(self, node: Node) -> None:
        out = self._place(node.outputs[0])
        self._emit(EmbeddingStep(node.weights[0], float(node.attributes["scale"]), out), node)

    def _hidden(self, node: Node) -> None:
        self._emit(HiddenStep(self._place(node.outputs[0])), node)

    def _select_rows(self, node: Node) -> None:
        x, y = node.inputs[0], node.outputs[0]
        self._selected.add(y.index)
        self._emit(SelectStep(self._place(x), self._place(y), x.width, selected=True), node)

    def _gather_columns(self, node: Node) -> None:
        x, out = node.inputs[0], node.outputs[0]
        self._emit(GatherColumnsStep(node.weights[0], self._place(x), self._place(out), x.width), node)

    def _scale_by_sequence(self, node: Node) -> None:
        x, out = node.inputs[0], node.outputs[0]
        slots, scales = node.weights
        self._emit(
            ScaleBySequenceStep(slots, scales, self._place(x), self._place(out), x.width, out.width), node
        )

    def _split(self, node: Node) -> None:
        base = self._place(node.inputs[0])
        offset = base.offset
        for value in node.outputs:
            self._places[value.index] = Place(base.storage, offset)
            offset += value.width
        self._done.add(id(node))

    def _rms_norm(self, node: Node) -> None:
        value = node.outputs[0]
        group = int(node.attributes["group"])
        users = self._consumers.get(value.index, [])
        if group == value.width and users and all(user.operator == "linear" for user in users):
            return  # folded into its linears
        if group != value.width and self._attention_after(node) is not None:
            return  # folded into attention
        step = NormStep(_norm(node), self._place(node.inputs[0]), self._place(value), value.width, group)
        self._emit(step, node)

    def _attention_after(self, node: Node) -> Node | None:
        """The attention that takes this norm's or rotary's value, and nothing else does."""
        user = self._single_consumer(node.outputs[0])
        if user is not None and user.operator == "rotary":
            user = self._single_consumer(user.outputs[0])
        return user if user is not None and user.operator == "attention" else None

    def _rotary(self, node: Node) -> None:
        if self._attention_after(node) is None:
            raise UnsupportedError("the CPU device rotates only values that go into one attention")

    def _linear(self, node: Node) -> None:
        source = node.inputs[0]
        norm_node = self._producer.get(source.index)
        norm = None
        x = source
        if norm_node is not None and norm_node.operator == "rms_norm" and id(norm_node) not in self._done:
            norm, x = _norm(norm_node), norm_node.inputs[0]
        group = [
            n for n in self._consumers[source.index] if n.operator == "linear" and id(n) not in self._done
        ]
        if norm is None:
            # Without a norm to share, grouping far-apart linears would only reorder the plan.
            group = group if group[0] is node else [node]
        if self._gated_pair(group, x, norm) or self._gated_split(group, x, norm):
            return
        if len(group) == 1 and self._residual(group[0], x, norm):
            return
        parts = [
            LinearPart(n.weights[0], 0, n.outputs[0].width, self._place(n.outputs[0]), _bias(n))
            for n in group
        ]
        self._emit(LinearStep(self._place(x), source.width, parts, norm), *group)

    def _gated_pair(self, group: list[Node], x: Value, norm: NormWeights | None) -> bool:
        """gate and up are two linears and meet in one gated activation."""
        if len(group) != 2:
            return False
        user = self._single_consumer(group[0].outputs[0])
        if (
            user is None
            or user.operator != "gated_activation"
            or not self._only_use(group[1].outputs[0], user)
        ):
            return False
        by_value = {n.outputs[0].index: n for n in group}
        gate, up = (by_value[value.index] for value in user.inputs)
        out = self._place(user.outputs[0])
        parts = [LinearPart(n.weights[0], 0, n.outputs[0].width, out, _bias(n)) for n in (gate, up)]
        step = LinearStep(self._place(x), group[0].inputs[0].width, parts, norm, str(user.attributes["kind"]))
        self._emit(step, gate, up, user)
        return True

    def _gated_split(self, group: list[Node], x: Value, norm: NormWeights | None) -> bool:
        """gate and up are the halves of one linear (Phi-3)."""
        if len(group) != 1:
            return False
        node = group[0]
        split = self._single_consumer(node.outputs[0])
        if split is None or split.operator != "split" or len(split.outputs) != 2:
            return False
        user = self._single_consumer(split.outputs[0])
        if user is None or user.operator != "gated_activation" or not self._only_use(split.outputs[1], user):
            return False
        rows = {split.outputs[0].index: 0, split.outputs[1].index: split.outputs[0].width}
        out = self._place(user.outputs[0])
        parts = [
            LinearPart(node.weights[0], rows[v.index], v.width, out, _bias(node), rows[v.index])
            for v in user.inputs
        ]
        step = LinearStep(self._place(x), node.inputs[0].width, parts, norm, str(user.attributes["kind"]))
        self._emit(step, node, split, user)
        return True

    def _residual(self, node: Node, x: Value, norm: NormWeights | None) -> bool:
        """The linear's result is only added to something that exists by then."""
        value = node.outputs[0]
        user = self._single_consumer(value)
        if user is None or user.operator != "add":
            return False
        other = user.inputs[0] if user.inputs[1].index == value.index else user.inputs[1]
        if other.index == value.index:
            return False
        pending: list[Node] = []
        if other.index not in self._places:
            # A selection of rows that the model file wrote between the two.
            maker = self._producer[other.index]
            if maker.operator != "select_rows" or maker.inputs[0].index not in self._places:
                return False
            pending.append(maker)
        for maker in pending:
            self._select_rows(maker)
        part = LinearPart(
            node.weights[0], 0, value.width, self._place(user.outputs[0]), _bias(node), 0, self._place(other)
        )
        self._emit(LinearStep(self._place(x), node.inputs[0].width, [part], norm), node, user)
        return True

    def _attention(self, node: Node) -> None:
        q, q_norm, q_rope, q_nodes = self._unwrap(node.inputs[0])
        k, k_norm, k_rope, k_nodes = self._unwrap(node.inputs[1])
        if q_rope != k_rope:
            raise UnsupportedError("the CPU device rotates q and k of an attention alike")
        a = node.attributes
        head_dim = int(a["head_dim"])
        step = AttentionStep(
            self._place(q),
            self._place(k),
            self._place(node.inputs[2]),
            self._place(node.outputs[0]),
            q.width // head_dim,
            k.width // head_dim,
            head_dim,
            int(a["layer"]),
            a["window"],
            float(a["scale"]),
            a["softcap"],
            q_norm,
            k_norm,
            q_rope,
        )
        self._emit(step, node, *q_nodes, *k_nodes)

    def _unwrap(self, value: Value) -> tuple[Value, NormWeights | None, RopeConfig | None, list[Node]]:
        """The projection behind an attention input, and the norm and rotary on the way."""
        norm: NormWeights | None = None
        rope: RopeConfig | None = None
        nodes: list[Node] = []
        node = self._producer[value.index]
        if node.operator == "rotary":
            rope = node.attributes["rope"]
            nodes.append(node)
            value = node.inputs[0]
            node = self._producer[value.index]
        if node.operator == "rms_norm" and id(node) not in self._done:
            norm = _norm(node)
            nodes.append(node)
            value = node.inputs[0]
        return value, norm, rope, nodes

    def _gated_activation(self, node: Node) -> None:
        gate, up = node.inputs
        step = ElementwiseStep(
            "gated",
            self._place(gate),
            self._place(up),
            self._place(node.outputs[0]),
            gate.width,
            activation=str(node.attributes["kind"]),
        )
        self._emit(step, node)

    def _add(self, node: Node) -> None:
        a, b = node.inputs
        self._emit(
            ElementwiseStep("add", self._place(a), self._place(b), self._place(node.outputs[0]), a.width),
            node,
        )

    def _scale(self, node: Node) -> None:
        self._with_constant(node, "scale", float(node.attributes["factor"]))

    def _softcap(self, node: Node) -> None:
        self._with_constant(node, "softcap", float(node.attributes["cap"]))

    def _with_constant(self, node: Node, kind: str, factor: float) -> None:
        x = node.inputs[0]
        self._emit(
            ElementwiseStep(kind, self._place(x), None, self._place(node.outputs[0]), x.width, factor), node
        )


def _norm(node: Node) -> NormWeights:
    return NormWeights(node.weights[0], float(node.attributes["eps"]), float(node.attributes["offset"]))


def _bias(node: Node) -> str | None:
    return node.weights[1] if len(node.weights) > 1 else None
