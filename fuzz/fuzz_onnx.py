"""A mutational fuzzer of the ONNX reader: damaged models must give a NybbleError or a sound checkpoint.

    python fuzz/fuzz_onnx.py --cases 100000 --seed 0

Seeds are the tiny models of tests/data/onnx. Half of the cases damage bytes (bit flips, truncation,
insertion, doubled ranges), the others damage the parsed model: inputs and outputs of nodes exchanged,
operators, attributes, shapes, types and numbers replaced by boundary values, nodes dropped or doubled,
external data that lies. A case may allocate ``MEMORY`` bytes; see harness.py for what a crash is.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "fuzz")]

from harness import Fuzzer  # noqa: E402

from nybble.errors import NybbleError  # noqa: E402
from nybble.formats.onnx.proto import parse_model  # noqa: E402
from nybble.formats.onnx.read import recognise  # noqa: E402

CORPUS = ROOT / "tests" / "data" / "onnx"
MEMORY = 600 << 20
"""Bytes that a case may take: a few arrays of the largest size that masks and tables may have."""

INTEGERS = (-(2**63), -(2**31), -1000, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 255, 4096,
            65536, 2**20, 2**26, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-38, 1e38, float("inf"), float("-inf"), float("nan"), 0.5, 1e-6)
OPERATORS = (
    "Add", "Mul", "Sub", "Div", "Pow", "MatMul", "Gemm", "Reshape", "Transpose", "Slice", "Split", "Concat",
    "Gather", "Expand", "Tile", "Cast", "Shape", "Where", "Softmax", "ReduceMean", "ReduceSum", "Range",
    "ConstantOfShape", "CumSum", "Trilu", "Squeeze", "Unsqueeze", "Sigmoid", "Tanh", "Gelu", "Neg", "Sqrt",
    "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "RotaryEmbedding", "GroupQueryAttention",
    "MultiHeadAttention", "Attention", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
    "RMSNormalization", "If", "Flatten", "GatherND", "IsNaN", "Identity", "Size", "Xyz",
)  # fmt: skip


def load_seeds() -> list[bytes]:
    """The seed models, smallest first."""
    return sorted((path.read_bytes() for path in CORPUS.glob("*/model.onnx")), key=len)


def damage_bytes(rng: random.Random, seed: bytes) -> bytes:
    """One to six changes of bytes; most of them where the graph is, not the weights."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((4, 50, 500))]
        else:
            del data[max(at, 1) :]
        if not data:
            break
    return bytes(data)


def damage_model(rng: random.Random, seed: bytes) -> bytes:
    """One to four changes of the parsed model."""
    import onnx

    model: Any = onnx.ModelProto()
    model.ParseFromString(seed)
    for _ in range(rng.randint(1, 4)):
        rng.choice(CHANGES)(rng, model.graph)
    data: bytes = model.SerializeToString()
    return data


def change_input(rng: random.Random, graph: Any) -> None:
    node = rng.choice(graph.node)
    if node.input:
        names = [name for other in graph.node for name in (*other.input, *other.output)]
        node.input[rng.randrange(len(node.input))] = rng.choice([*names, "", "nothing"])


def change_output(rng: random.Random, graph: Any) -> None:
    node = rng.choice(graph.node)
    if node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(rng.choice(graph.node).output or [""])


def change_operator(rng: random.Random, graph: Any) -> None:
    node = rng.choice(graph.node)
    node.op_type = rng.choice(OPERATORS)
    if rng.random() < 0.5:
        node.domain = rng.choice(("", "com.microsoft", "ai.onnx", "x"))


def change_attribute(rng: random.Random, graph: Any) -> None:
    nodes = [node for node in graph.node if node.attribute]
    if not nodes:
        return
    attribute = rng.choice(rng.choice(nodes).attribute)
    kind = rng.randrange(6)
    if kind == 0:
        attribute.i = rng.choice(INTEGERS)
    elif kind == 1:
        attribute.f = rng.choice(FLOATS)
    elif kind == 2:
        attribute.ints.append(rng.choice(INTEGERS))
    elif kind == 3:
        attribute.type = rng.randrange(14)
    elif kind == 4 and attribute.HasField("t"):
        change_tensor(rng, attribute.t)
    else:
        attribute.name = rng.choice(("axis", "perm", "to", "K", "N", "bits", "block_size", "epsilon", "x"))


def change_tensor(rng: random.Random, tensor: Any) -> None:
    kind = rng.randrange(6)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif kind == 1:
        tensor.data_type = rng.randrange(28)
    elif kind == 2 and tensor.raw_data:
        data = bytearray(tensor.raw_data)
        for _ in range(rng.choice((1, 8))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        tensor.raw_data = bytes(data)
    elif kind == 3:
        tensor.dims.append(rng.choice(INTEGERS))
    elif kind == 4:
        tensor.data_location = 1
        tensor.external_data.add(key="location", value=rng.choice(("../x", "/etc/passwd", "model.onnx", "")))
        tensor.external_data.add(key="offset", value=str(rng.choice(INTEGERS)))
    else:
        tensor.int64_data.append(rng.choice(INTEGERS))


def change_initializer(rng: random.Random, graph: Any) -> None:
    if graph.initializer:
        change_tensor(rng, rng.choice(graph.initializer))


def change_constant(rng: random.Random, graph: Any) -> None:
    """A small array of whole numbers: shapes, axes, limits."""
    import onnx

    nodes = [node for node in graph.node if node.op_type == "Constant"]
    if nodes:
        node = rng.choice(nodes)
        values = [rng.choice(INTEGERS) for _ in range(rng.randrange(5))]
        del node.attribute[:]
        tensor = onnx.helper.make_tensor("v", 7, (len(values),), values)
        node.attribute.append(onnx.helper.make_attribute("value", tensor))


def change_border(rng: random.Random, graph: Any) -> None:
    value = rng.choice([*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    if rng.random() < 0.3:
        value.name = rng.choice(("input_ids", "logits", "past_key_values.0.key", "x", "attention_mask"))
    elif dims:
        rng.choice(dims).dim_value = rng.choice(INTEGERS)


def drop_node(rng: random.Random, graph: Any) -> None:
    if len(graph.node) > 1:
        del graph.node[rng.randrange(len(graph.node))]


def double_node(rng: random.Random, graph: Any) -> None:
    graph.node.append(rng.choice(graph.node))


CHANGES = (
    change_input, change_input, change_output, change_operator, change_attribute, change_attribute,
    change_initializer, change_constant, change_constant, change_border, drop_node, double_node,
)  # fmt: skip


def damage(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A damaged model."""
    seed = seeds[min(rng.randrange(len(seeds)), rng.randrange(len(seeds)))]
    return damage_bytes(rng, seed) if rng.random() < 0.3 else damage_model(rng, seed)


def look(data: bytes) -> bool:
    """Reads a model and every tensor of it; whether it was accepted.

    Raises:
        Exception: anything but a NybbleError is a crash.
    """
    try:
        found = recognise(parse_model(data), None, {}, {})
        for name, tensor in found.tensors.items():
            assert tensor.name == name
            assert tensor.data.size == tensor.nbytes
    except NybbleError as error:
        assert len(str(error)) < 20_000
        return False
    return True


def memory_limit(size: int) -> int:
    return MEMORY


FUZZER = Fuzzer("onnx", load_seeds, damage, look, memory_limit, seconds=20.0)

if __name__ == "__main__":
    sys.exit(FUZZER.main(__doc__, cases=10_000))
