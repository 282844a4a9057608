"""The operator rms_norm with ONNX Runtime's own nodes, alone or together with the sum before it.

Where the target wants norms in float32 but the stream is float16, the sum is a node of its own in
float16, and casts surround the norm.
"""

from __future__ import annotations

from nybble.graph.graph import Node
from nybble.graph.onnx.lowering import Lowering, Sum, node_path
from nybble.graph.onnx.names import stem
from nybble.graph.onnx.nodes import MICROSOFT, ElementType
from nybble.graph.onnx.weights import float_array


def rms_norm(lowering: Lowering, node: Node) -> None:
    """``SimplifiedLayerNormalization``, or ``SkipSimplifiedLayerNormalization`` after a sum of its type."""
    value = node.inputs[0]
    if node.attributes["group"] != value.width:
        lowering.values[node.outputs[0].index] = _grouped(lowering, node)
        return
    found = lowering.values[value.index]
    kind = norm_type(lowering)
    weight = norm_weight(lowering, node, kind)
    name = node_path(stem(node.weights[0], lowering.graph.num_layers))
    epsilon = node.attributes["eps"]
    output = f"{name}/output_0"
    if isinstance(found, Sum) and kind == lowering.stream_type:
        inputs = [lowering.name(item, kind) for item in (found.a, found.b)]
        outputs = [output]
        if lowering.uses[value.index] > 1:
            lowering.values[value.index] = f"{name}/output_3"
            outputs += ["", "", f"{name}/output_3"]
        lowering.node_with(
            "SkipSimplifiedLayerNormalization",
            [*inputs, weight],
            outputs,
            name=f"{name}/SkipLayerNorm",
            element_types=[kind] * len(outputs),
            domain=MICROSOFT,
            epsilon=epsilon,
        )
    else:
        lowering.node(
            "SimplifiedLayerNormalization",
            [lowering.cast(lowering.name(value, lowering.stream_type), kind), weight],
            name=f"{name}/LayerNorm",
            output=output,
            element_type=kind,
            epsilon=epsilon,
            axis=-1,
            stash_type=1,
        )
    lowering.values[node.outputs[0].index] = output


def norm_type(lowering: Lowering) -> ElementType:
    """What a norm reckons in: the stream's type, or float32 where the target wants that."""
    return "f32" if lowering.target.float32_norms else lowering.stream_type


def norm_weight(lowering: Lowering, node: Node, element_type: ElementType) -> str:
    """The norm's weight as an initializer."""
    tensor = lowering.tensors[node.weights[0]]
    name = f"{stem(node.weights[0], lowering.graph.num_layers)}.weight"
    return lowering.initializer(name, element_type, tensor.shape, lambda: float_array(tensor, element_type))


def _grouped(lowering: Lowering, node: Node) -> str:
    """The norm of each head."""
    value = node.inputs[0]
    size = node.attributes["group"]
    name = node_path(stem(node.weights[0], lowering.graph.num_layers).removesuffix(".layernorm"))
    kind: ElementType = "f32" if lowering.target.float32_norms else lowering.element_type
    x = lowering.name(value, kind)
    heads = lowering.constant([0, -1, size], "i64")
    x = lowering.node("Reshape", [x, heads], name=f"{name}/Reshape_1", element_type=kind)
    x = lowering.node(
        "SimplifiedLayerNormalization",
        [x, norm_weight(lowering, node, kind)],
        name=f"{name}/SimplifiedLayerNormalization",
        element_type=kind,
        epsilon=node.attributes["eps"],
        axis=-1,
        stash_type=1,
    )
    whole = lowering.constant([0, -1, value.width], "i64")
    return lowering.node("Reshape", [x, whole], name=f"{name}/Reshape_2", element_type=kind)
