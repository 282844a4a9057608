"""Reads back how the portable form gathers rows of an integer embedding.

``graph/onnx/portable_integers.py`` spells it out in some twenty nodes, because ``Gather`` knows no 4-bit
types. Here the same nodes are made anew from the stored arrays' names and shapes; where the model has
exactly these, three plain ones take their place: ``DequantizeLinear``, ``Transpose``, ``Gather``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat, affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.formats.onnx.to_proto import node_proto
from nybble.graph.graph import Graph, Value
from nybble.graph.onnx.linear import EMBEDDING
from nybble.graph.onnx.lowering import ONNX_TYPES, Lowering
from nybble.graph.onnx.nodes import OnnxNode
from nybble.graph.onnx.portable_integers import blocked_embedding, integer_type
from nybble.graph.onnx.target import Target

if TYPE_CHECKING:
    import onnx

_NODES = "/model/embed_tokens"
_NAMES = {number: name for name, number in ONNX_TYPES.items()}


def with_plain_embedding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with those nodes replaced, or the model itself where they are not all there."""
    graph = model.graph
    stored = {item.name: item for item in graph.initializer}
    tied = "lm_head.MatMul.weight_of_embedding" in stored
    base = "lm_head.MatMul.weight" if tied else "model.embed_tokens.MatMul.weight"
    codes, scales = stored.get(base), stored.get(f"{base}_scales")
    if f"{base}_of_embedding" not in stored or codes is None or scales is None:
        return model
    lowering = _expected(codes, scales, f"{base}_zero_points" in stored, tied)
    if lowering is None:
        return model
    found = {output: node for node in graph.node for output in node.output}
    wanted = [node_proto(node) for node in lowering.nodes]
    if any(not _same(found.get(node.output[0]), node) for node in wanted):
        return model
    replaced = {node.output[0] for node in wanted if node.op_type != "Constant"}
    last = wanted[-1].output[0]
    kept = [node for node in graph.node if node.output[0] not in replaced]
    if any(name in replaced and name != last for node in kept for name in node.input):
        return model
    result = type(model)()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend([*_plain(base, codes, scales, f"{base}_zero_points" in stored, last), *kept])
    return result


def _expected(
    codes: onnx.TensorProto, scales: onnx.TensorProto, zero_point: bool, tied: bool
) -> Lowering | None:
    """The nodes that the writer would make for arrays of these shapes and types."""
    if len(codes.dims) != 2 or len(scales.dims) != 2 or min(*codes.dims, *scales.dims) <= 0:
        return None
    columns, rows = codes.dims
    size, rest = divmod(columns, scales.dims[0])
    element, scale = _NAMES.get(codes.data_type), _NAMES.get(scales.data_type, "")
    if rest or scales.dims[1] != rows or scale not in ("f32", "f16"):
        return None
    # Two bits are held in four and read as such.
    forms = [AffineFormat(bits, size, scale, zero_point) for bits in (4, 8)]
    form = next((form for form in forms if integer_type(form) == element and affine_format(form.name)), None)
    if form is None:
        return None
    tensor = Tensor(EMBEDDING, (rows, columns), encoding(form.name), np.empty(0, np.uint8))
    config = ModelConfig(
        "llama", rows, columns, 1, 0, 1, 1, 2, 1, RopeConfig(1.0, 2), tie_word_embeddings=tied
    )
    target = Target("", "", "f16" if scale == "f16" else "f32", portable=True)
    lowering = Lowering(Graph((), Value(0, rows), 0), config, {EMBEDDING: tensor}, target, None)
    blocked_embedding(lowering, tensor, form, _NODES)
    return lowering


def _same(found: onnx.NodeProto | None, wanted: onnx.NodeProto) -> bool:
    """Whether two nodes compute the same from the same."""
    if found is None:
        return False

    def parts(node: onnx.NodeProto) -> object:
        attributes = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
        return node.domain, node.op_type, list(node.input), list(node.output), attributes

    return parts(found) == parts(wanted)


def _plain(
    base: str, codes: onnx.TensorProto, scales: onnx.TensorProto, zero_point: bool, output: str
) -> list[onnx.NodeProto]:
    """Rows by token id of a matrix (hidden_size, vocab_size) with blocks along its columns."""
    size = codes.dims[0] // scales.dims[0]
    inputs = (base, f"{base}_scales", f"{base}_zero_points") if zero_point else (base, f"{base}_scales")
    names = [f"{_NODES}/plain/{part}" for part in ("DequantizeLinear", "Transpose", "Gather")]
    nodes = (
        OnnxNode("DequantizeLinear", inputs, (names[0],), {"axis": 0, "block_size": size}, name=names[0]),
        OnnxNode("Transpose", (names[0],), (names[1],), {"perm": [1, 0]}, name=names[1]),
        OnnxNode("Gather", (names[1], "input_ids"), (output,), {"axis": 0}, name=names[2]),
    )
    return [node_proto(node) for node in nodes]
