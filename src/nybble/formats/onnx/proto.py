"""An ONNX file as protocol buffer: read with limits, weights left where they are.

Files are hostile. Sizes are checked before anything is allocated, nesting is bounded, and external
data stays outside until someone asks for it (``external_data.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import FormatError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    import onnx

MAX_FILE = (1 << 31) - 1
"""Bytes of a protocol buffer: its own limit."""
MAX_NODES = 500_000
MAX_DEPTH = 4
"""Graphs inside graphs."""
INSTALL = 'install it with: pip install "nybble[onnx]"'


def import_onnx() -> Any:
    """The package `onnx`.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UnsupportedError(f"reading ONNX files needs the package onnx; {INSTALL}") from error
    return onnx


def load_model(path: Path) -> onnx.ModelProto:
    """The model in a file, without its external data.

    Raises:
        NotFoundError: no such file.
        FormatError: it is too large, no ONNX model, or nested too deep.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise FormatError(f"{path}: {size} bytes; an ONNX file has at most {MAX_FILE}, use external data")
        data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error}") from error
    return parse_model(data, str(path))


def parse_model(data: bytes, where: str = "<memory>") -> onnx.ModelProto:
    """The model in the bytes; errors as ``load_model``."""
    package = import_onnx()
    from google.protobuf.message import DecodeError

    model: onnx.ModelProto = package.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{where}: not an ONNX model: {error}") from None
    if not model.HasField("graph") or not model.graph.node:
        raise FormatError(f"{where}: the ONNX model has no graph")
    if model.functions:
        names = ", ".join(function.name for function in model.functions[:3])
        raise UnsupportedError(
            f"{where}: the ONNX model has functions of its own ({names}); "
            'inline them, or run it as it is with device="onnxruntime:cpu"'
        )
    nodes = 0
    for graph, depth in graphs(model.graph):
        nodes += len(graph.node)
        if depth > MAX_DEPTH:
            raise FormatError(f"{where}: graphs are nested more than {MAX_DEPTH} deep")
        if nodes > MAX_NODES:
            raise FormatError(f"{where}: more than {MAX_NODES} nodes")
        if not all(isinstance(text, str) for text in _texts(graph)):
            raise FormatError(f"{where}: a name is no UTF-8")  # protobuf gives such as bytes
        if graph.sparse_initializer:
            raise UnsupportedError(f"{where}: sparse initializers are not supported")
    return model


def _texts(graph: onnx.GraphProto) -> Iterator[object]:
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name


def graphs(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, int]]:
    """A graph and those inside it, each with its depth."""
    stack = [(graph, 0)]
    while stack:
        found, depth = stack.pop()
        yield found, depth
        if depth > MAX_DEPTH:
            continue
        for node in found.node:
            for attribute in node.attribute:
                inner = [attribute.g] if attribute.HasField("g") else []
                stack += [(item, depth + 1) for item in (*inner, *attribute.graphs)]


def attributes(node: onnx.NodeProto, where: str) -> dict[str, Any]:
    """A node's attributes by name: numbers, text, lists, TensorProto or GraphProto.

    Raises:
        FormatError: an attribute of a kind that no operator here has.
    """
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        kind = attribute.type
        if kind == 1:
            found[attribute.name] = float(attribute.f)
        elif kind == 2:
            found[attribute.name] = int(attribute.i)
        elif kind == 3:
            found[attribute.name] = attribute.s.decode("utf-8", "replace")
        elif kind == 4:
            found[attribute.name] = attribute.t
        elif kind == 5:
            found[attribute.name] = attribute.g
        elif kind == 6:
            found[attribute.name] = [float(value) for value in attribute.floats]
        elif kind == 7:
            found[attribute.name] = [int(value) for value in attribute.ints]
        else:
            raise FormatError(
                f"{where}: node {title(node)} has the attribute {attribute.name} of type {kind}"
            )
    return found


def title(node: onnx.NodeProto) -> str:
    """What messages call a node: operator, and name or first output."""
    name = node.name or next((name for name in node.output if name), "")
    return f"{node.op_type} {name!r}"


def input_shape(value: onnx.ValueInfoProto) -> Sequence[int | None]:
    """A graph input's dimensions; None where they are symbolic."""
    dims = value.type.tensor_type.shape.dim
    return [int(dim.dim_value) if dim.HasField("dim_value") else None for dim in dims]
