"""Integer weights that have a minimum in each group: what is added to the product of their symmetric codes.

With a middle of the codes, and sums over each block's columns,

    sum(x * (code * scale + minimum)) = sum(x * (code - middle) * scale) + sum(x) * (minimum + middle * scale)

so a linear is a product with symmetric integers, as everybody has, plus a ``MatMul`` of the block sums of
its input with the centres (blocks, rows), which are the second bracket. Sums are made once for all linears
of an input. Around their centres codes are small, so that rounding activations to int8 (``accuracy_level``
4) loses no more than it does for symmetric weights.

Stored are minima and the middle as they are; centres are nodes on stored arrays only, which ONNX Runtime
computes when it loads a model. So a reader finds the very same numbers again.
"""

from __future__ import annotations

from nybble.graph.onnx.lowering import Lowering, node_path
from nybble.graph.onnx.nodes import ElementType, Initializer


def minima_initializers(base: str, element_type: ElementType, shape: tuple[int, int]) -> list[Initializer]:
    """Minima, in the shape of the scales, and the code that is the middle, as a number."""
    return [
        Initializer(f"{base}_minima", element_type, shape),
        Initializer(f"{base}_middle", element_type, ()),
    ]


def scales_of_centres(lowering: Lowering, base: str) -> str:
    """The name under which centres read the scales.

    ONNX Runtime makes a ``MatMulNBits`` of standard operators only where nothing else reads the scales.
    """
    return f"{base}_scales_of_centres" if lowering.target.portable else f"{base}_scales"


def with_minima(lowering: Lowering, own: str, product: str, source: str, *, columns: int, size: int) -> str:
    """The product of a linear's symmetric codes with ``source``, and its minima's part."""
    sums = _block_sums(lowering, source, columns, size)
    part = lowering.node("MatMul", [sums, _centres(lowering, own)], name=node_path(own, "MatMul_centres"))
    return lowering.node("Add", [product, part], name=node_path(own, "Add_centres"))


def embedding_with_minima(lowering: Lowering, own: str, x: str, name: str, *, columns: int, size: int) -> str:
    """Rows of an embedding's symmetric codes by ``input_ids`` (batch, tokens, columns), and their minima."""
    kind = lowering.element_type
    blocks, whole = _by_blocks(lowering, columns, size), lowering.constant([0, 0, columns], "i64")
    x = lowering.node("Reshape", [x, blocks], name=f"{name}/minima/Reshape", element_type=kind)
    rows = lowering.node(
        "Gather", [_centres(lowering, own), "input_ids"], name=f"{name}/minima/Gather", axis=1
    )
    rows = lowering.node("Transpose", [rows], name=f"{name}/minima/Transpose", perm=[1, 2, 0])
    last = lowering.constant([-1], "i64")
    rows = lowering.node("Unsqueeze", [rows, last], name=f"{name}/minima/Unsqueeze")
    x = lowering.node("Add", [x, rows], name=f"{name}/minima/Add")
    return lowering.node("Reshape", [x, whole], name=f"{name}/minima/Reshape_back")


def _by_blocks(lowering: Lowering, columns: int, size: int) -> str:
    return lowering.constant([0, 0, columns // size, size], "i64")


def _block_sums(lowering: Lowering, source: str, columns: int, size: int) -> str:
    """Sums over blocks of neighbouring features: (batch, tokens, columns / size)."""
    base = source.removesuffix("/output_0")
    name = f"{base if base.startswith('/') else f'/model/{base}'}/block_sums_{size}"
    result = f"{name}/ReduceSum/output_0"
    if result not in lowering.shared:
        lowering.shared.add(result)
        x = lowering.node("Reshape", [source, _by_blocks(lowering, columns, size)], name=f"{name}/Reshape")
        axes = lowering.constant([-1], "i64")
        lowering.node("ReduceSum", [x, axes], name=f"{name}/ReduceSum", output=result, keepdims=0)
    return result


def _centres(lowering: Lowering, own: str) -> str:
    """minimum + middle * scale of a weight: (blocks, rows)."""
    base, name = f"{own}.MatMul.weight", node_path(own, "centres")
    last = "Add" if lowering.target.portable else "Transpose"
    result = f"{name}/{last}/output_0"
    if result not in lowering.shared:
        lowering.shared.add(result)
        scales = scales_of_centres(lowering, base)
        x = lowering.node("Mul", [scales, f"{base}_middle"], name=f"{name}/Mul")
        x = lowering.node("Add", [f"{base}_minima", x], name=f"{name}/Add")
        if not lowering.target.portable:
            lowering.node("Transpose", [x], name=f"{name}/Transpose", perm=[1, 0])
    return result
