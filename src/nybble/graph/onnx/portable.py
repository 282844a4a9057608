"""The portable form: rms_norm, rotary and attention with standard operators only.

Sources: https://onnx.ai/onnx/operators/ (RMSNormalization-23, RotaryEmbedding-23, Attention-23).
"""

from __future__ import annotations

from nybble.graph.graph import Node
from nybble.graph.onnx.lowering import ONNX_TYPES, Lowering, node_path
from nybble.graph.onnx.names import stem
from nybble.graph.onnx.norms import norm_weight
from nybble.graph.onnx.rotary import concatenated_tables, positions, total_length

_MASK = "/model/attention_mask"


def rms_norm(lowering: Lowering, node: Node) -> None:
    """``RMSNormalization`` over all columns, or over each group of them."""
    value, size = node.inputs[0], node.attributes["group"]
    x = lowering.name(value, lowering.element_type)
    name = node_path(stem(node.weights[0], lowering.graph.num_layers))
    if size != value.width:
        groups = lowering.constant([0, 0, -1, size], "i64")
        x = lowering.node("Reshape", [x, groups], name=f"{name}/Reshape_1")
    x = lowering.node(
        "RMSNormalization",
        [x, norm_weight(lowering, node, lowering.element_type)],
        name=f"{name}/RMSNormalization",
        axis=-1,
        epsilon=node.attributes["eps"],
        stash_type=1,
    )
    if size != value.width:
        whole = lowering.constant([0, 0, value.width], "i64")
        x = lowering.node("Reshape", [x, whole], name=f"{name}/Reshape_2")
    lowering.values[node.outputs[0].index] = x


def rotary(lowering: Lowering, node: Node) -> None:
    """``RotaryEmbedding`` over each head."""
    value, rope, head_dim = node.inputs[0], node.attributes["rope"], node.attributes["head_dim"]
    x = lowering.name(value, lowering.element_type)
    cos, sin = concatenated_tables(lowering, rope)
    lowering.values[node.outputs[0].index] = lowering.node(
        "RotaryEmbedding",
        [x, cos, sin, positions(lowering, rope)],
        name=lowering.unique("/model/rotary/RotaryEmbedding"),
        interleaved=0,
        num_heads=value.width // head_dim,
        rotary_embedding_dim=rope.rotary_dim if rope.rotary_dim != head_dim else 0,
    )


def attention(lowering: Lowering, node: Node) -> None:
    """``Attention`` with its caches and a mask that says all: causal, window, padding."""
    q, k, v = node.inputs
    attributes = node.attributes
    layer, head_dim = attributes["layer"], attributes["head_dim"]
    name = f"/model/layers.{layer}/attn/Attention"
    past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    inputs = [lowering.name(value, lowering.element_type) for value in (q, k, v)]
    lowering.node_with(
        "Attention",
        [*inputs, mask(lowering, attributes["window"]), *past],
        [f"{name}/output_0", *(f"present.{layer}.{kind}" for kind in ("key", "value"))],
        name=name,
        element_types=[lowering.element_type] * 3,
        q_num_heads=q.width // head_dim,
        kv_num_heads=k.width // head_dim,
        scale=float(attributes["scale"]),
        softcap=float(attributes["softcap"] or 0.0),
        is_causal=0,
    )
    lowering.values[node.outputs[0].index] = f"{name}/output_0"


def mask(lowering: Lowering, window: int | None) -> str:
    """Which keys a query sees: bool (batch, 1, tokens, length); every query sees itself.

    Places are counted in the cache, so padding on the left moves no window.
    """
    name = f"{_MASK}/window_{window}" if window is not None else f"{_MASK}/full"
    result = f"{name}/Or/output_0"
    if result in lowering.shared:
        return result
    lowering.shared.add(result)
    query, key, itself, filled = _places(lowering)
    sees = lowering.node("LessOrEqual", [key, query], name=f"{name}/LessOrEqual", element_type="bool")
    if window is not None:
        size = lowering.constant(window, "i64")
        before = lowering.node("Sub", [query, size], name=f"{name}/Sub", element_type="i64")
        inside = lowering.node("Greater", [key, before], name=f"{name}/Greater", element_type="bool")
        sees = lowering.node("And", [sees, inside], name=f"{name}/And_window", element_type="bool")
    sees = lowering.node("And", [sees, filled], name=f"{name}/And", element_type="bool")
    return lowering.node("Or", [sees, itself], name=f"{name}/Or", element_type="bool")


def _places(lowering: Lowering) -> tuple[str, str, str, str]:
    """Places of queries (tokens, 1) and keys (length), where they are equal, and which keys are filled."""
    names = tuple(
        f"{_MASK}/{part}/output_0" for part in ("query/Unsqueeze", "key/Range", "Equal", "Unsqueeze")
    )
    if names[0] not in lowering.shared:
        lowering.shared.add(names[0])
        zero, one = lowering.constant(0, "i64"), lowering.constant(1, "i64")
        total = total_length(lowering)
        shape = lowering.node("Shape", ["input_ids"], name=f"{_MASK}/query/Shape", element_type="i64")
        count = lowering.node("Gather", [shape, one], name=f"{_MASK}/query/Gather", element_type="i64")
        first = lowering.node("Sub", [total, count], name=f"{_MASK}/query/Sub", element_type="i64")
        query = lowering.node("Range", [first, total, one], name=f"{_MASK}/query/Range", element_type="i64")
        last = lowering.constant([1], "i64")
        query = lowering.node("Unsqueeze", [query, last], name=f"{_MASK}/query/Unsqueeze", element_type="i64")
        key = lowering.node("Range", [zero, total, one], name=f"{_MASK}/key/Range", element_type="i64")
        lowering.node("Equal", [query, key], name=f"{_MASK}/Equal", element_type="bool")
        kind = ONNX_TYPES["bool"]
        filled = lowering.node("Cast", ["attention_mask"], name=f"{_MASK}/Cast", to=kind, element_type="bool")
        middle = lowering.constant([1, 2], "i64")
        lowering.node("Unsqueeze", [filled, middle], name=f"{_MASK}/Unsqueeze", element_type="bool")
    query, key, itself, filled = names
    return query, key, itself, filled
