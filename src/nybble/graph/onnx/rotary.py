"""The operator rotary with ONNX Runtime's own nodes: tables of cosines and sines, and who rotates.

LongRoPE has two tables. Which one counts is the sequence's current length, so the graph decides:
with ``If`` where attention rotates (only as many rows as the sequence has are copied), and with
positions moved past the short table where a node of its own rotates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.config import RopeConfig
from nybble.errors import UnsupportedError
from nybble.graph.graph import Node, Value
from nybble.graph.onnx.lowering import ONNX_TYPES, Lowering, Rotated
from nybble.graph.onnx.nodes import (
    NUMPY_TYPES,
    ElementType,
    Initializer,
    OnnxGraph,
    OnnxNode,
    OnnxValue,
)
from nybble.graph.rotary import rotary_frequencies


def rotary(lowering: Lowering, node: Node) -> None:
    """Notes the rotation: attention may do it."""
    rope = node.attributes["rope"]
    lowering.values[node.outputs[0].index] = Rotated(node.inputs[0], rope, node.attributes["head_dim"])


def make_rotated(lowering: Lowering, value: Value, found: Rotated) -> str:
    """``RotaryEmbedding`` of ONNX Runtime, at the positions that are an input of the model."""
    x = lowering.name(found.x, lowering.element_type)
    cos, sin = concatenated_tables(lowering, found.rope)
    name = x.removesuffix("/output_0").removesuffix("/MatMul").removesuffix("/Add").removesuffix("/Reshape_2")
    partial = found.rope.rotary_dim != found.head_dim
    return lowering.microsoft(
        "RotaryEmbedding",
        [x, positions(lowering, found.rope), cos, sin],
        name=f"{name}/RotaryEmbedding",
        interleaved=0,
        num_heads=value.width // found.head_dim if partial else 0,
        rotary_embedding_dim=found.rope.rotary_dim if partial else 0,
    )


def table_name(lowering: Lowering, rope: RopeConfig) -> str:
    """What follows ``cos_cache``: nothing, or which kind of layer the table is for."""
    if lowering.config.rope_local is None:
        return ""
    return "_local" if rope == lowering.config.rope_local else "_global"


def make_table(
    rope: RopeConfig, length: int, rows: int, element_type: ElementType
) -> Sequence[npt.NDArray[Any]]:
    """Cosines and sines (rows, rotary_dim / 2) of the first positions, for sequences of ``length``."""
    frequencies, factor = rotary_frequencies(rope, length)
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies
    kind = NUMPY_TYPES[element_type]
    return [(f(angles) * np.float32(factor)).astype(kind) for f in (np.cos, np.sin)]


def check_rope(rope: RopeConfig) -> None:
    """Refuses what a table cannot hold."""
    if rope.interleaved:
        raise ValueError("q and k rows rotate neighbours; bring the checkpoint into ONNX form first")
    if rope.kind == "dynamic":
        raise UnsupportedError(
            "dynamic rotary scaling grows with the sequence, which no ONNX table can hold; other kinds of"
            " scaling can be written"
        )


def _table(lowering: Lowering, rope: RopeConfig, suffix: str, length: int, rows: int) -> tuple[str, str]:
    check_rope(rope)
    cos, sin = f"cos_cache{suffix}", f"sin_cache{suffix}"
    kind = lowering.element_type
    if cos not in lowering.groups:
        shape = (rows, rope.rotary_dim // 2)
        items = [Initializer(cos, kind, shape), Initializer(sin, kind, shape)]
        lowering.initializers(items, lambda: make_table(rope, length, rows, kind))
    return cos, sin


def tables(lowering: Lowering, rope: RopeConfig) -> tuple[str, str]:
    """Names of the tables for attention that rotates: of the current length where that matters."""
    suffix, context = table_name(lowering, rope), lowering.config.max_position_embeddings
    original = rope.original_max_position_embeddings
    if rope.kind != "longrope" or original is None or context <= original:
        return _table(lowering, rope, suffix, context, context)
    cos, sin = f"cos_cache{suffix}", f"sin_cache{suffix}"
    if cos in lowering.shared:
        return cos, sin
    lowering.shared.add(cos)
    small = _table(lowering, rope, f"{suffix}_small", original, original)
    large = _table(lowering, rope, f"{suffix}_large", context, context)
    total = total_length(lowering)
    base = f"/model/rope_caches_subgraph{suffix}"
    limit = lowering.constant(original, "i64")
    is_long = lowering.node("Greater", [total, limit], name=f"{base}/Greater", element_type="bool")
    axis = lowering.constant([0], "i64")
    ends = lowering.node("Unsqueeze", [total, axis], name=f"{base}/Unsqueeze", element_type="i64")

    def branch(label: str, names: tuple[str, str]) -> OnnxGraph:
        outputs = [f"{name}/{label}" for name in (cos, sin)]
        nodes = tuple(
            OnnxNode("Slice", (table, axis, ends, axis), (output,), name=f"/{label}/{table}/Slice")
            for table, output in zip(names, outputs, strict=True)
        )
        shape = ("rotary_positions", rope.rotary_dim // 2)
        values = tuple(OnnxValue(output, lowering.element_type, shape) for output in outputs)
        return OnnxGraph(f"rope_{label}", nodes, (), values)

    lowering.node_with(
        "If",
        [is_long],
        [cos, sin],
        name=f"{base}/If",
        element_types=[lowering.element_type] * 2,
        then_branch=branch("large", large),
        else_branch=branch("small", small),
    )
    return cos, sin


def concatenated_tables(lowering: Lowering, rope: RopeConfig) -> tuple[str, str]:
    """Names of the tables for a node that rotates: short rows, then long ones."""
    suffix, context = table_name(lowering, rope), lowering.config.max_position_embeddings
    original = rope.original_max_position_embeddings
    if rope.kind != "longrope" or original is None or context <= original:
        return _table(lowering, rope, suffix, context, context)
    check_rope(rope)
    cos, sin = f"cos_cache{suffix}", f"sin_cache{suffix}"
    kind, short = lowering.element_type, original
    if cos not in lowering.groups:
        shape = (short + context, rope.rotary_dim // 2)

        def make() -> list[npt.NDArray[Any]]:
            both = (make_table(rope, n, n, kind) for n in (short, context))
            return [np.concatenate(pair) for pair in zip(*both, strict=True)]

        lowering.initializers([Initializer(cos, kind, shape), Initializer(sin, kind, shape)], make)
    return cos, sin


def positions(lowering: Lowering, rope: RopeConfig) -> str:
    """Rows of the concatenated table: positions, past the short rows in each sequence that is long."""
    original = rope.original_max_position_embeddings
    if rope.kind != "longrope" or original is None or lowering.config.max_position_embeddings <= original:
        return "position_ids"
    base = "/model/pos_ids_reformat"
    result = f"{base}/Add_1/output_0"
    if result in lowering.shared:
        return result
    lowering.shared.add(result)
    limit = lowering.constant(original, "i64")
    axis = lowering.constant([1], "i64")
    highest = lowering.node("ReduceMax", ["position_ids", axis], name=f"{base}/ReduceMax", element_type="i64")
    is_long = lowering.node(
        "GreaterOrEqual", [highest, limit], name=f"{base}/GreaterOrEqual", element_type="bool"
    )
    number = lowering.node("Cast", [is_long], name=f"{base}/Cast", to=ONNX_TYPES["i64"], element_type="i64")
    moved = lowering.node("Mul", [number, limit], name=f"{base}/Mul", element_type="i64")
    return lowering.node("Add", [moved, "position_ids"], name=f"{base}/Add_1", element_type="i64")


def total_length(lowering: Lowering) -> str:
    """Tokens of the longest sequence, cached ones included: i64, a scalar."""
    base = "/model/attn_mask_reformat/attn_mask_subgraph"
    result = f"{base}/Gather/output_0"
    if result not in lowering.shared:
        lowering.shared.add(result)
        shape = lowering.node("Shape", ["attention_mask"], name=f"{base}/Shape", element_type="i64")
        second = lowering.constant(1, "i64")
        lowering.node("Gather", [shape, second], name=f"{base}/Gather", axis=0, element_type="i64")
    return result
