"""An ``OnnxGraph`` as protocol buffer, its weights in a data file beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble import __version__
from nybble.formats.onnx.external_data_writer import Placed
from nybble.graph.onnx.lowering import ONNX_TYPES
from nybble.graph.onnx.nodes import NUMPY_TYPES, OnnxGraph, OnnxNode, OnnxValue

if TYPE_CHECKING:
    import onnx

_TYPE_OF = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items() if name not in ("u4", "i4", "bf16")}


def to_proto(
    graph: OnnxGraph,
    placed: Sequence[Placed],
    data_file: str,
    *,
    opsets: Mapping[str, int],
    ir_version: int,
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """The model.

    Args:
        graph: nodes, inputs and outputs.
        placed: its initializers, in ``data_file``.
        data_file: name of the data file, in the model's folder.
        opsets: operator set versions by domain.
        ir_version: of the ONNX format.
        metadata: for ``metadata_props``.
    """
    from onnx import helper

    proto = helper.make_graph(
        [node_proto(node) for node in graph.nodes],
        graph.name,
        [_value(value) for value in graph.inputs],
        [_value(value) for value in graph.outputs],
        [_external(item, data_file) for item in placed],
    )
    model = helper.make_model(
        proto,
        producer_name="nybble",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
    )
    model.ir_version = ir_version
    helper.set_model_props(model, dict(metadata))
    return model


def node_proto(node: OnnxNode) -> onnx.NodeProto:
    """One node."""
    from onnx import helper

    attributes = {key: _attribute(value) for key, value in node.attributes.items()}
    return helper.make_node(
        node.op_type, node.inputs, node.outputs, name=node.name, domain=node.domain or None, **attributes
    )


def _attribute(value: Any) -> Any:
    from onnx import helper

    if isinstance(value, np.ndarray):
        kind = ONNX_TYPES[_TYPE_OF[value.dtype]]
        return helper.make_tensor("", kind, value.shape, value.tobytes(), raw=True)
    if isinstance(value, OnnxGraph):
        return helper.make_graph(
            [node_proto(node) for node in value.nodes],
            value.name,
            [_value(item) for item in value.inputs],
            [_value(item) for item in value.outputs],
        )
    return value


def _value(value: OnnxValue) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(value.name, ONNX_TYPES[value.element_type], value.shape)


def _external(item: Placed, data_file: str) -> onnx.TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(
        name=item.initializer.name,
        data_type=ONNX_TYPES[item.initializer.element_type],
        dims=item.initializer.shape,
        data_location=TensorProto.EXTERNAL,
    )
    where = {"location": data_file, "offset": item.offset, "length": item.initializer.nbytes}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
