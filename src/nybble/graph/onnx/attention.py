"""The operator attention as ``GroupQueryAttention``, with its caches, and the lengths that it wants."""

from __future__ import annotations

from nybble.graph.graph import Node, Value
from nybble.graph.onnx.linear import whole_product
from nybble.graph.onnx.lowering import ONNX_TYPES, Lowering, Projection, Rotated
from nybble.graph.onnx.nodes import OnnxValue
from nybble.graph.onnx.rotary import tables, total_length


def declare_inputs(lowering: Lowering) -> None:
    """Token ids and mask, positions where a node of its own rotates, and the caches."""
    lowering.add_input("input_ids", "i64", ("batch_size", "sequence_length"))
    lowering.add_input("attention_mask", "i64", ("batch_size", "total_sequence_length"))
    if not lowering.target.rotary_in_attention:
        lowering.add_input("position_ids", "i64", ("batch_size", "sequence_length"))
    for kind in ("key", "value"):
        for layer in range(lowering.graph.num_layers):
            lowering.add_input(
                f"past_key_values.{layer}.{kind}",
                lowering.element_type,
                cache_shape(lowering, layer, "past"),
            )


def cache_outputs(lowering: Lowering) -> list[OnnxValue]:
    """The caches with the new keys and values."""
    return [
        OnnxValue(f"present.{layer}.{kind}", lowering.element_type, cache_shape(lowering, layer, "total"))
        for kind in ("key", "value")
        for layer in range(lowering.graph.num_layers)
    ]


def cache_shape(lowering: Lowering, layer: int, which: str) -> tuple[str, int, str, int]:
    """(batch, key-value heads, tokens, head_dim); ``which``: past or total."""
    config = lowering.config
    window = lowering.target.cache_window(config, layer)
    length = f"{which}_{'sequence' if window is None else 'sliding'}_length"
    return "batch_size", config.num_key_value_heads, length, config.head_dim


def attention(lowering: Lowering, node: Node) -> None:
    """``GroupQueryAttention``; q, k and v are one packed input where they come from one product."""
    q, k, v = node.inputs
    attributes = node.attributes
    layer = attributes["layer"]
    ropes = [found.rope for value in (q, k) if isinstance(found := lowering.values[value.index], Rotated)]
    rotates = lowering.target.rotary_in_attention and len(ropes) == 2 and ropes[0] == ropes[1]
    cos, sin = tables(lowering, ropes[0]) if rotates else ("", "")
    if rotates:
        q, k = (_before_rotation(lowering, value) for value in (q, k))
    packed = _packed(lowering, (q, k, v))
    if packed is not None:
        inputs = [packed, "", ""]
    else:
        inputs = [lowering.name(value, lowering.element_type) for value in (q, k, v)]
    name = f"/model/layers.{layer}/attn/GroupQueryAttention"
    past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    window = attributes["window"]
    kept = lowering.target.cache_window(lowering.config, layer)
    windowed = {} if kept is None else {"sliding_window_cache": 1}
    lowering.node_with(
        "GroupQueryAttention",
        [*inputs, *past, *lengths(lowering), cos, sin],
        [f"{name}/output_0", *present],
        name=name,
        element_types=[lowering.element_type] * 3,
        domain="com.microsoft",
        num_heads=q.width // attributes["head_dim"],
        kv_num_heads=k.width // attributes["head_dim"],
        scale=float(attributes["scale"]),
        local_window_size=-1 if window is None else window,
        softcap=float(attributes["softcap"] or 0.0),
        do_rotary=int(rotates),
        rotary_interleaved=0,
        **windowed,
    )
    lowering.values[node.outputs[0].index] = f"{name}/output_0"


def _before_rotation(lowering: Lowering, value: Value) -> Value:
    found = lowering.values[value.index]
    return found.x if isinstance(found, Rotated) else value


def _packed(lowering: Lowering, values: tuple[Value, Value, Value]) -> str | None:
    """The product that holds q, k and v side by side, if there is one."""
    if not lowering.target.pack_qkv:
        return None
    found = [lowering.values[value.index] for value in values]
    pieces = [item for item in found if isinstance(item, Projection)]
    if [item.piece for item in pieces] != [0, 1, 2]:
        return None
    matrix = pieces[0].matrix
    if any(item.matrix is not matrix for item in pieces) or len(matrix.sizes) != 3:
        return None
    return whole_product(lowering, matrix)


def lengths(lowering: Lowering) -> tuple[str, str]:
    """Position of each sequence's last token, i32 (batch), and the longest length, i32 scalar."""
    base = "/model/attn_mask_reformat/attn_mask_subgraph"
    last, longest = f"{base}/Sub/Cast/output_0", f"{base}/Gather/Cast/output_0"
    if last not in lowering.shared:
        lowering.shared.add(last)
        one = lowering.constant([1], "i64")
        count = lowering.node(
            "ReduceSum", ["attention_mask", one], name=f"{base}/ReduceSum", keepdims=0, element_type="i64"
        )
        before = lowering.node("Sub", [count, one], name=f"{base}/Sub", element_type="i64")
        kind = ONNX_TYPES["i32"]
        lowering.node("Cast", [before], name=f"{base}/Sub/Cast", to=kind, element_type="i32")
        total = total_length(lowering)
        lowering.node("Cast", [total], name=f"{base}/Gather/Cast", to=kind, element_type="i32")
    return last, longest
