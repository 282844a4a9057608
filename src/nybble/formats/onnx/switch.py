"""Finds the length at which a decoder's graph changes its rotary tables (LongRoPE).

Two forms are known, both of onnxruntime-genai's model builder: ``If(length of attention_mask > limit)``
chooses between two pairs of tables, or ``ReduceMax(position_ids) >= limit`` moves the positions into the
second half of one table. A comparison that is found without need costs a prefill, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Switch:
    """``length``: the longest sequence that is computed the first way. ``by_mask_size``: what counts is
    how long attention_mask is, zeros included."""

    length: int
    by_mask_size: bool


_PASSED = {"Cast", "Gather", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Slice"}
_SCALARS = {"Shape", "ReduceMax", "ReduceSum"}
_MAX_STEPS = 64


def length_switch(graph: onnx.GraphProto, roles: Mapping[str, str], where: str) -> Switch | None:
    """The switch of a graph; None where there is none.

    ``roles`` maps input names to roles.

    Raises:
        UnsupportedError: there are several switches at different lengths.
    """
    constants = _integers(graph)
    producers = {output: node for node in graph.node for output in node.output}
    found = set()
    for node in graph.node:
        if node.op_type not in ("Greater", "GreaterOrEqual") or len(node.input) != 2:
            continue
        limit = constants.get(node.input[1])
        source = _source(node.input[0], producers, roles)
        if limit is None or limit < 2 or source is None:
            continue
        role, by_size = source
        # A position is one less than the length of the sequence that it ends.
        length = limit - (node.op_type == "GreaterOrEqual") + (role == "position_ids")
        found.add(Switch(length, by_size and role == "attention_mask"))
    if len(found) > 1:
        lengths = sorted({switch.length for switch in found})
        raise UnsupportedError(f"{where}: switches its rotary tables in several ways, at lengths {lengths}")
    return found.pop() if found else None


def _integers(graph: onnx.GraphProto) -> dict[str, int]:
    """Constants of one whole number."""
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    integers = {}
    for name, tensor in tensors.items():
        whole = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        inside = tensor.data_location != onnx.TensorProto.EXTERNAL
        if whole and inside and list(tensor.dims) in ([], [1]):
            integers[name] = int(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])
    return integers


def _source(
    value: str, producers: Mapping[str, onnx.NodeProto], roles: Mapping[str, str]
) -> tuple[str, bool] | None:
    """The role of the input whose length or largest item ``value`` is, and whether it is a length."""
    is_scalar = is_size = False
    for _ in range(_MAX_STEPS):
        if value in roles:
            counts = is_scalar and roles[value] in ("attention_mask", "position_ids")
            return (roles[value], is_size) if counts else None
        node = producers.get(value)
        if node is None or node.op_type not in _PASSED | _SCALARS or not node.input:
            return None
        is_scalar |= node.op_type in _SCALARS
        is_size |= node.op_type == "Shape"
        value = node.input[0]
    return None
