"""The operators linear and embedding, and which linears are one multiplication.

Integer weights become ``MatMulNBits`` and ``GatherBlockQuantized``, float ones ``MatMul`` and
``Gather``; the portable form has its own for integers (``portable_integers``). A tied embedding is
stored once.
"""

from __future__ import annotations

import numpy as np

from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.encodings.affine import AffineFormat, affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.graph.graph import Graph, Node, Value
from nybble.graph.onnx.lowering import Lowering, Matrix, Projection, node_path
from nybble.graph.onnx.minima import embedding_with_minima, minima_initializers, with_minima
from nybble.graph.onnx.names import stem
from nybble.graph.onnx.nodes import ElementType, Initializer
from nybble.graph.onnx.portable_integers import blocked_embedding, blocked_product
from nybble.graph.onnx.weights import (
    FLOATS,
    Rows,
    float_array,
    float_rows,
    nbits_arrays,
    vector_array,
    written_encoding,
)

EMBEDDING = "model.embed_tokens.weight"
_PIECES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What fused weights are made of."""


# -- embedding ---------------------------------------------------------------------------------------


def embedding(lowering: Lowering, node: Node) -> None:
    """Rows of the embedding by ``input_ids``, times its scale."""
    tensor = lowering.tensors[node.weights[0]]
    name = "/model/embed_tokens"
    form = affine_format(encoding_of(lowering, tensor).name)
    if form is None:
        x = _gather(lowering, tensor, name)
    elif lowering.target.portable:
        x = blocked_embedding(lowering, tensor, form, name)
    else:
        x = _gather_quantized(lowering, tensor, form, name)
    if form is not None and form.has_minimum:
        own = "lm_head" if lowering.config.tie_word_embeddings else "model.embed_tokens"
        x = embedding_with_minima(lowering, own, x, name, columns=tensor.shape[1], size=form.group_size)
    factor = node.attributes["scale"]
    if factor != 1.0:
        # The product may leave float16's range before it is normalized.
        x = lowering.cast(x, lowering.stream_type)
        constant = lowering.constant(factor, lowering.stream_type)
        x = lowering.node("Mul", [x, constant], name=f"{name}/Mul", element_type=lowering.stream_type)
    lowering.values[node.outputs[0].index] = x


def encoding_of(lowering: Lowering, tensor: Tensor) -> Encoding:
    """What a matrix is written as; an embedding that is not tied stays float."""
    embedding_only = tensor.name == EMBEDDING and not lowering.config.tie_word_embeddings
    if embedding_only and tensor.encoding.name in FLOATS:
        return encoding(_gathered_type(lowering, tensor))
    output = tensor.name in (EMBEDDING, "lm_head.weight")
    return written_encoding(tensor, lowering.target, lowering.method, output=output)


def _gathered_type(lowering: Lowering, tensor: Tensor) -> ElementType:
    """The type of a float embedding: its own where that is half the bytes for the same values."""
    own = tensor.encoding.name
    if lowering.target.provider == "cpu" and not lowering.config.tie_word_embeddings:
        if own == "f16":
            return "f16"
        if own == "bf16":
            return "bf16"
    return lowering.element_type


def _gather(lowering: Lowering, tensor: Tensor, name: str) -> str:
    kind = _gathered_type(lowering, tensor)
    weight = lowering.initializer(EMBEDDING, kind, tensor.shape, lambda: float_array(tensor, kind))
    x = lowering.node("Gather", [weight, "input_ids"], name=f"{name}/Gather", element_type=kind)
    return lowering.cast(x, lowering.element_type)


def _gather_quantized(lowering: Lowering, tensor: Tensor, form: AffineFormat, name: str) -> str:
    rows, columns = tensor.shape
    tied = lowering.config.tie_word_embeddings
    data = Initializer(f"model.embed_tokens.weight_Q{form.bits}", "u8", (rows, columns * form.bits // 8))
    own = "lm_head" if tied else "model.embed_tokens"
    names = _nbits_initializers(lowering, own, Rows(((tensor, 0, rows),)), form, data)
    return lowering.microsoft(
        "GatherBlockQuantized",
        [data.name, "input_ids", *names[1:]],
        name=f"{name}/GatherBlockQuantized",
        bits=form.bits,
        block_size=form.group_size,
        gather_axis=0,
        quantize_axis=1,
    )


# -- linear ------------------------------------------------------------------------------------------


def linear(lowering: Lowering, node: Node) -> None:
    """Notes the product; it is made where it is needed."""
    weight = node.weights[0]
    pack = lowering.packs.get(weight)
    if pack is not None:
        lowering.values[node.outputs[0].index] = Projection(pack, pack.weights.index(weight))
        return
    own = "lm_head" if weight == EMBEDDING else stem(weight, lowering.graph.num_layers)
    size = lowering.tensors[weight].shape[0]
    matrix = Matrix(node.inputs[0], (weight,), node.weights[1:], (size,), (own,), own)
    lowering.values[node.outputs[0].index] = Projection(matrix, None)


def split(lowering: Lowering, node: Node) -> None:
    """Column ranges: pieces of a product where the value is one, else a Split node."""
    found = lowering.values[node.inputs[0].index]
    widths = tuple(value.width for value in node.outputs)
    if isinstance(found, Projection) and found.piece is None and lowering.uses[node.inputs[0].index] == 1:
        matrix = found.matrix
        parent, _, last = matrix.stem.rpartition(".")
        names = _PIECES.get(last, ())
        if len(names) != len(widths):
            names = tuple(f"{last}.{i}" for i in range(len(widths)))
        matrix.sizes, matrix.stems = widths, tuple(f"{parent}.{name}" for name in names)
        for piece, value in enumerate(node.outputs):
            lowering.values[value.index] = Projection(matrix, piece)
        return
    x = lowering.name(node.inputs[0])
    name = lowering.unique("/model/Split")
    outputs = [f"{name}/output_{i}" for i in range(len(widths))]
    lowering.node_with(
        "Split", [x, lowering.constant(widths, "i64")], outputs, name=name, axis=-1,
        element_types=[lowering.type_of(x)] * len(widths),
    )  # fmt: skip
    for value, output in zip(node.outputs, outputs, strict=True):
        lowering.values[value.index] = output


def make_projection(lowering: Lowering, value: Value, projection: Projection) -> str:
    """The product, or the piece of it, as nodes."""
    matrix, piece = projection.matrix, projection.piece
    if piece is None:
        return whole_product(lowering, matrix)
    if len(matrix.weights) == 1:
        # One weight in the file, but the values are used apart: multiply with its rows apart.
        begin = sum(matrix.sizes[:piece])
        weight = lowering.tensors[matrix.weights[0]]
        end = begin + matrix.sizes[piece]
        bias = tuple((lowering.tensors[name], begin, end) for name in matrix.biases)
        return _multiply(lowering, matrix.stems[piece], Rows(((weight, begin, end),)), bias, matrix.x)
    if not matrix.pieces:
        name = node_path(matrix.stem, "Split")
        outputs = [f"{name}/output_{i}" for i in range(len(matrix.sizes))]
        inputs = [whole_product(lowering, matrix), lowering.constant(matrix.sizes, "i64")]
        lowering.node_with(
            "Split", inputs, outputs, name=name, axis=-1,
            element_types=[lowering.element_type] * len(outputs),
        )  # fmt: skip
        matrix.pieces = tuple(outputs)
    return matrix.pieces[piece]


def whole_product(lowering: Lowering, matrix: Matrix) -> str:
    """The product of a matrix with all its rows."""
    if matrix.whole is None:
        weights = tuple((t, 0, t.shape[0]) for t in (lowering.tensors[name] for name in matrix.weights))
        biases = tuple((t, 0, t.shape[0]) for t in (lowering.tensors[name] for name in matrix.biases))
        matrix.whole = _multiply(lowering, matrix.stem, Rows(weights), biases, matrix.x)
    return matrix.whole


def _multiply(
    lowering: Lowering, own: str, rows: Rows, biases: tuple[tuple[Tensor, int, int], ...], x: Value
) -> str:
    form = affine_format(encoding_of(lowering, rows.parts[0][0]).name)
    source = lowering.name(x, lowering.element_type)
    if form is None:
        y = _float_product(lowering, own, rows, source)
    elif lowering.target.portable:
        y = blocked_product(lowering, own, rows, form, source)
    else:
        y = _integer_product(lowering, own, rows, form, source)
    if form is not None and form.has_minimum:
        y = with_minima(lowering, own, y, source, columns=rows.shape[1], size=form.group_size)
    if not biases:
        return y
    count = rows.shape[0]
    kind = lowering.element_type
    bias = lowering.initializer(f"{own}.Add.bias", kind, (count,), lambda: vector_array(biases, kind))
    return lowering.node("Add", [y, bias], name=node_path(own, "Add"))


def _float_product(lowering: Lowering, own: str, rows: Rows, source: str) -> str:
    count, columns = rows.shape
    if own == "lm_head" and EMBEDDING in lowering.groups and lowering.config.tie_word_embeddings:
        weight = lowering.node("Transpose", [EMBEDDING], name="/lm_head/Transpose", perm=[1, 0])
    else:
        weight = lowering.initializer(
            f"{own}.MatMul.weight",
            lowering.element_type,
            (columns, count),
            lambda: float_rows(rows, lowering.element_type, transposed=True),
        )
    return lowering.node("MatMul", [source, weight], name=node_path(own, "MatMul"))


def _integer_product(lowering: Lowering, own: str, rows: Rows, form: AffineFormat, source: str) -> str:
    count, columns = rows.shape
    attributes = {"K": columns, "N": count, "bits": form.bits, "block_size": form.group_size}
    if lowering.target.accuracy_level:
        attributes["accuracy_level"] = lowering.target.accuracy_level
    return lowering.microsoft(
        "MatMulNBits",
        [source, *_nbits_initializers(lowering, own, rows, form)],
        name=node_path(own, f"MatMul_Q{form.bits}"),
        output=node_path(own, "MatMul", "output_0"),
        **attributes,
    )


def _nbits_initializers(
    lowering: Lowering, own: str, rows: Rows, form: AffineFormat, alias: Initializer | None = None
) -> list[str]:
    """Codes, scales and zero points of a matrix, declared once; minima too, which are not returned."""
    base, count_named = f"{own}.MatMul.weight", 2 + form.has_zero_point
    found = lowering.groups.get(f"{base}_Q{form.bits}")
    if found is not None:
        return [item.name for item in found.initializers[:count_named]]
    count, columns = rows.shape
    blocks = columns // form.group_size
    element_type = lowering.element_type
    items = [
        Initializer(f"{base}_Q{form.bits}", "u8", (count, blocks, form.code_bytes)),
        Initializer(f"{base}_scales", element_type, (count, blocks)),
    ]
    if form.has_zero_point:
        items.append(Initializer(f"{base}_zero_points", "u8", (count, -(-blocks * form.bits // 8))))
    if form.has_minimum:
        items += minima_initializers(base, element_type, (count, blocks))
    aliases = () if alias is None else ((0, alias),)
    names = lowering.initializers(items, lambda: nbits_arrays(rows, form, element_type), aliases)
    return names[:count_named]


# -- q, k and v as one -------------------------------------------------------------------------------


def find_packs(lowering: Lowering, graph: Graph) -> dict[str, Matrix]:
    """Which q, k and v projections are one multiplication, by the names of their weights."""
    producers = {value.index: node for node in graph.nodes for value in node.outputs}
    packs: dict[str, Matrix] = {}
    for node in graph.nodes:
        if node.operator != "attention":
            continue
        linears = [_producing_linear(producers, value) for value in node.inputs]
        if any(found is None for found in linears):
            continue
        nodes = [found for found in linears if found is not None]
        kinds = {encoding_of(lowering, lowering.tensors[found.weights[0]]).name for found in nodes}
        sources = {found.inputs[0].index for found in nodes}
        if len(kinds) > 1 or len(sources) > 1 or len({len(found.weights) for found in nodes}) > 1:
            continue
        weights = tuple(found.weights[0] for found in nodes)
        stems = tuple(stem(name, graph.num_layers) for name in weights)
        own = stems[0].rpartition(".")[0] + ".qkv_proj"
        biases = tuple(name for found in nodes for name in found.weights[1:])
        sizes = tuple(found.outputs[0].width for found in nodes)
        matrix = Matrix(nodes[0].inputs[0], weights, biases, sizes, stems, own)
        packs |= dict.fromkeys(weights, matrix)
    return packs


def _producing_linear(producers: dict[int, Node], value: Value) -> Node | None:
    """The linear that a value comes from, through rotary embedding and norms."""
    node = producers.get(value.index)
    while node is not None and node.operator in ("rotary", "rms_norm"):
        node = producers.get(node.inputs[0].index)
    return node if node is not None and node.operator == "linear" else None


def gather_columns(lowering: Lowering, node: Node) -> None:
    """Columns in another order: GPTQ's act-order sorts a weight's columns, and its input follows."""
    tensor = lowering.tensors[node.weights[0]]
    name = lowering.unique(node_path(stem(node.weights[0], lowering.graph.num_layers), "GatherColumns"))
    columns = lowering.initializer(
        f"{stem(node.weights[0], lowering.graph.num_layers)}.input_permutation",
        "i64",
        tensor.shape,
        lambda: tensor.data.view("<i4").astype(np.int64),
    )
    x = lowering.name(node.inputs[0], lowering.element_type)
    lowering.values[node.outputs[0].index] = lowering.node("Gather", [x, columns], name=name, axis=-1)
