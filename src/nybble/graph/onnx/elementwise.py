"""Operators that work on each element: add, scale, softcap, gated_activation, select_rows."""

from __future__ import annotations

from nybble.graph.graph import Node, Value
from nybble.graph.onnx.lowering import Lowering, Sum


def add(lowering: Lowering, node: Node) -> None:
    """Notes the sum, for a norm may follow."""
    lowering.values[node.outputs[0].index] = Sum(*node.inputs)


def make_sum(lowering: Lowering, value: Value, found: Sum) -> str:
    """The sum as a node."""
    inputs = [lowering.name(item, lowering.stream_type) for item in (found.a, found.b)]
    name = lowering.unique("/model/residual/Add")
    return lowering.node("Add", inputs, name=name, element_type=lowering.stream_type)


def scale(lowering: Lowering, node: Node) -> None:
    """x * factor."""
    x = lowering.name(node.inputs[0])
    kind = lowering.type_of(x)
    factor = lowering.constant(node.attributes["factor"], kind)
    name = lowering.unique("/model/scale/Mul")
    lowering.values[node.outputs[0].index] = lowering.node("Mul", [x, factor], name=name, element_type=kind)


def softcap(lowering: Lowering, node: Node) -> None:
    """cap * tanh(x / cap)."""
    x = lowering.name(node.inputs[0])
    kind = lowering.type_of(x)
    cap = lowering.constant(node.attributes["cap"], kind)
    name = lowering.unique("/lm_head/softcap")
    x = lowering.node("Div", [x, cap], name=f"{name}/Div", element_type=kind)
    x = lowering.node("Tanh", [x], name=f"{name}/Tanh", element_type=kind)
    lowering.values[node.outputs[0].index] = lowering.node(
        "Mul", [x, cap], name=f"{name}/Mul", element_type=kind
    )


def gated_activation(lowering: Lowering, node: Node) -> None:
    """activation(gate) * up."""
    gate = lowering.name(node.inputs[0], lowering.element_type)
    up = lowering.name(node.inputs[1], lowering.element_type)
    # Named after the gate's projection, as the builder does.
    base = gate.split("/gate_proj/")[0] if "/gate_proj/" in gate else lowering.unique("/model/mlp")
    kind = node.attributes["kind"]
    if kind == "silu":
        sigmoid = lowering.node("Sigmoid", [gate], name=f"{base}/act_fn/Sigmoid")
        active = lowering.node("Mul", [gate, sigmoid], name=f"{base}/act_fn/Mul")
    else:
        approximate = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}[kind]
        active = lowering.node("Gelu", [gate], name=f"{base}/act_fn/Gelu", approximate=approximate)
    lowering.values[node.outputs[0].index] = lowering.node("Mul", [active, up], name=f"{base}/Mul")


def select_rows(lowering: Lowering, node: Node) -> None:
    """All rows: onnxruntime-genai wants the logits of every token of a prompt."""
    lowering.values[node.outputs[0].index] = lowering.values[node.inputs[0].index]
