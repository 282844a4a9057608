"""Integer weights with standard operators: blocked ``DequantizeLinear``, and rows of an embedding by hand.

A linear's weight is stored (in_features, out_features) with blocks along the first axis, so that a
``MatMul`` follows at once; ONNX Runtime makes its ``MatMulNBits`` of the two. An embedding is stored
so as well, and once where it is tied: its rows are columns there, and only those asked for are decoded.
``Gather`` knows no 4-bit types, so bytes are gathered and the right half is taken.

Symmetric codes are signed integers; the others have zero points of their own type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.affine import AffineFormat, scale_values
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.graph.onnx.lowering import ONNX_TYPES, Lowering, node_path
from nybble.graph.onnx.minima import minima_initializers, scales_of_centres
from nybble.graph.onnx.nodes import NUMPY_TYPES, ElementType, Initializer
from nybble.graph.onnx.weights import Rows, affine_parts, middle_code, pack_neighbours


def blocked_product(lowering: Lowering, own: str, rows: Rows, form: AffineFormat, source: str) -> str:
    """source @ weight, the weight decoded on the way."""
    names = _initializers(lowering, own, rows, form)
    name = node_path(own, "DequantizeLinear")
    weight = lowering.node("DequantizeLinear", names, name=name, axis=0, block_size=form.group_size)
    return lowering.node("MatMul", [source, weight], name=node_path(own, "MatMul"))


def blocked_embedding(lowering: Lowering, tensor: Tensor, form: AffineFormat, name: str) -> str:
    """Rows of an integer embedding by ``input_ids``: columns of what is stored."""
    count, columns = tensor.shape
    blocks, element_type = columns // form.group_size, lowering.element_type
    own = "lm_head" if lowering.config.tie_word_embeddings else "model.embed_tokens"
    codes, scales, *zeros = _initializers(lowering, own, Rows(((tensor, 0, count),)), form)
    x = _columns_at(lowering, codes, (columns, count), f"{name}/codes", form)
    shape = lowering.constant([0, 0, blocks, form.group_size], "i64")
    x = lowering.node("Reshape", [x, shape], name=f"{name}/codes/Reshape")
    last = lowering.constant([-1], "i64")
    if zeros:
        points = _columns_at(lowering, zeros[0], (blocks, count), f"{name}/zero_points", form)
        points = lowering.node("Unsqueeze", [points, last], name=f"{name}/zero_points/Unsqueeze")
        x = lowering.node("Sub", [x, points], name=f"{name}/Sub")
    factors = _gather_columns(lowering, scales, f"{name}/scales", element_type)
    factors = lowering.node("Unsqueeze", [factors, last], name=f"{name}/scales/Unsqueeze")
    x = lowering.node("Mul", [x, factors], name=f"{name}/scales/Mul")
    whole = lowering.constant([0, 0, columns], "i64")
    return lowering.node("Reshape", [x, whole], name=f"{name}/Reshape")


def integer_type(form: AffineFormat) -> ElementType:
    """The type that holds a form's codes; two bits are held in four."""
    if form.bits == 8:
        return "u8" if form.has_zero_point else "i8"
    return "u4" if form.has_zero_point else "i4"


# -- internals ---------------------------------------------------------------------------------------


def _nibbles(form: AffineFormat) -> bool:
    return form.bits != 8


def _initializers(lowering: Lowering, own: str, rows: Rows, form: AffineFormat) -> list[str]:
    """Codes, scales and zero points of a weight, declared once; minima too, which are not returned."""
    base, count_named = f"{own}.MatMul.weight", 2 + form.has_zero_point
    if base in lowering.groups:
        return [item.name for item in lowering.groups[base].initializers[:count_named]]
    kind, element_type = integer_type(form), lowering.element_type
    count, columns = rows.shape
    blocks = columns // form.group_size
    items = [
        Initializer(base, kind, (columns, count)),
        Initializer(f"{base}_scales", element_type, (blocks, count)),
    ]
    if form.has_zero_point:
        items.append(Initializer(f"{base}_zero_points", kind, (blocks, count)))
    aliases: list[tuple[int, Initializer]] = []
    if own == ("lm_head" if lowering.config.tie_word_embeddings else "model.embed_tokens"):
        # Gather knows no 4-bit types, and ONNX Runtime makes a MatMulNBits only of weights that nothing
        # else reads: the embedding has names of its own for the same bytes.
        for at, item in enumerate(items):
            flat = item.element_type in ("u4", "i4")
            read_as, shape = ("u8", (item.nbytes,)) if flat else (item.element_type, item.shape)
            aliases.append((at, Initializer(_embedding_name(item.name), read_as, shape)))
    if form.has_minimum:
        aliases.append((1, Initializer(scales_of_centres(lowering, base), element_type, items[1].shape)))
        items += minima_initializers(base, element_type, (blocks, count))
    names = lowering.initializers(items, lambda: _arrays(rows, form, element_type), aliases)
    return names[:count_named]


def _embedding_name(name: str) -> str:
    return f"{name}_of_embedding"


def _gather_columns(lowering: Lowering, data: str, name: str, kind: ElementType) -> str:
    """The columns of a matrix (n, vocab_size) by ``input_ids``: (batch, tokens, n)."""
    x = lowering.node(
        "Gather", [_embedding_name(data), "input_ids"], name=f"{name}/Gather", axis=1, element_type=kind
    )
    return lowering.node("Transpose", [x], name=f"{name}/Transpose", perm=[1, 2, 0], element_type=kind)


def _columns_at(lowering: Lowering, data: str, shape: tuple[int, int], name: str, form: AffineFormat) -> str:
    """The same for codes, as floats."""
    number, float_type = ONNX_TYPES[lowering.element_type], lowering.element_type
    if not _nibbles(form):
        kind = integer_type(form)
        x = _gather_columns(lowering, data, name, kind)
        return lowering.node("Cast", [x], name=f"{name}/Cast", to=number)

    def node(op_type: str, inputs: list[str], part: str, kind: ElementType, **attributes: Any) -> str:
        return lowering.node(op_type, inputs, name=f"{name}/{part}", element_type=kind, **attributes)

    rows, columns = shape
    starts = lowering.initializer(
        f"{data}_row_starts", "i64", (rows,), lambda: np.arange(rows, dtype=np.int64) * columns
    )
    two = lowering.constant(2, "i64")
    ids = node("Unsqueeze", ["input_ids", lowering.constant([-1], "i64")], "ids/Unsqueeze", "i64")
    place = node("Add", [ids, starts], "Add", "i64")
    byte = node("Div", [place, two], "Div", "i64")
    found = node("Gather", [_embedding_name(data), byte], "Gather", "u8")
    odd = node("Mod", [place, two], "Mod", "i64")
    odd = node("Cast", [odd], "Cast_odd", "bool", to=ONNX_TYPES["bool"])
    low = node("BitwiseAnd", [found, lowering.constant(15, "u8")], "BitwiseAnd", "u8")
    high = node("BitShift", [found, lowering.constant(4, "u8")], "BitShift", "u8", direction="RIGHT")
    code = node("Where", [odd, high, low], "Where", "u8")
    if form.has_zero_point:
        return node("Cast", [code], "Cast", float_type, to=number)
    # Two's complement of four bits.
    code = node("BitwiseXor", [code, lowering.constant(8, "u8")], "BitwiseXor", "u8")
    x = node("Cast", [code], "Cast", float_type, to=number)
    return node("Sub", [x, lowering.constant(8, float_type)], "Sub", float_type)


def _arrays(rows: Rows, written: AffineFormat, element_type: ElementType) -> list[npt.NDArray[Any]]:
    """Codes, scales and zero points with the blocks along the first axis; or codes less their middle,
    scales, minima and the middle."""
    count, columns = rows.shape
    blocks = columns // written.group_size
    codes = np.empty((columns, count), np.uint8)
    scales = np.empty((blocks, count), NUMPY_TYPES[element_type])
    zeros = np.empty((blocks, count), np.uint8) if written.has_zero_point else None
    minima = np.empty_like(scales) if written.has_minimum else None
    for row, parts, form in affine_parts(rows, written):
        place = slice(row, row + len(parts.codes))
        repeat = form.group_size // written.group_size
        codes[:, place] = parts.codes.T
        scales[:, place] = np.repeat(scale_values(parts.scales, form), repeat, axis=1).T
        if zeros is not None and parts.zero_points is not None:
            zeros[:, place] = np.repeat(parts.zero_points, repeat, axis=1).T
        if minima is not None and parts.minima is not None:
            minima[:, place] = np.repeat(scale_values(parts.minima, form), repeat, axis=1).T
    if zeros is not None:
        return [_packed(codes, written), scales, _packed(zeros, written)]
    middle = written.middle if minima is None else middle_code(codes, written)
    # Without zero points the codes become signed: two's complement of 8 bits, or of 4 for fewer.
    codes -= np.uint8(middle)
    if written.bits != 8:
        codes &= np.uint8(15)
    arrays: list[npt.NDArray[Any]] = [_packed(codes, written), scales]
    return arrays if minima is None else [*arrays, minima, np.array(middle, scales.dtype)]


def _packed(codes: Bytes, form: AffineFormat) -> Bytes:
    """4-bit codes two to a byte, across rows; others as they are."""
    if not _nibbles(form):
        return codes
    flat = codes.reshape(-1)
    return pack_neighbours(np.append(flat, np.uint8(0)) if flat.size % 2 else flat, 4)
