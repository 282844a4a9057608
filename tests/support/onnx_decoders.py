"""A small decoder of standard ONNX operators, with cache inputs and outputs as exporters name them.

Two layers of attention with learned positions: enough to test how a decoder is called. ``reference``
computes the same in NumPy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HIDDEN, HEADS, DIM, LONGEST, LAYERS = 50, 24, 3, 8, 40, 2
SCALE = DIM**-0.5


def weights(seed: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"embedding": (VOCABULARY, HIDDEN), "positions": (LONGEST, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"{name}{layer}": (HIDDEN, HIDDEN) for name in "qkvo"}
    return {name: draw.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def reference(tokens: list[int], seed: int = 3) -> np.ndarray:
    """Logits after every token: (len(tokens), VOCABULARY)."""
    w = weights(seed)
    count = len(tokens)
    x = w["embedding"][tokens] + w["positions"][:count]
    hidden = np.triu(np.full((count, count), -1e9, np.float32), 1)
    for layer in range(LAYERS):
        q, k, v = ((x @ w[f"{n}{layer}"]).reshape(count, HEADS, DIM).swapaxes(0, 1) for n in "qkv")
        scores = q @ k.swapaxes(1, 2) * np.float32(SCALE) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + mixed.swapaxes(0, 1).reshape(count, HIDDEN) @ w[f"o{layer}"]
    return x @ w["embedding"].T


def make_decoder(
    *,
    past: str = "past_key_values.%d",
    present: str = "present.%d",
    id_type: int = TensorProto.INT64,
    position_rank: int = 2,
    keeps_rows: bool = False,
    last_row_only: bool = False,
    extra_input: str | None = None,
) -> onnx.ModelProto:
    """The decoder. ``past`` and ``present`` are names without ``.key`` and ``.value``."""
    nodes: list[onnx.NodeProto] = []
    constants = {name: value for name, value in weights().items()}

    def constant(name: str, value: object, dtype: type = np.int64) -> str:
        constants[name] = np.array(value, dtype)
        return name

    def node(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    rows = "position_ids"
    if position_rank == 3:
        rows = node("Gather", ["position_ids", constant("first", 0)], "position_row", axis=0)
    x = node(
        "Add",
        [node("Gather", ["embedding", "input_ids"], "e"), node("Gather", ["positions", rows], "p")],
        "x0",
    )
    total = node("Gather", [node("Shape", ["attention_mask"], "ms"), constant("one", 1)], "total", axis=0)
    columns = node("Range", [constant("zero", 0), total, "one"], "columns")
    wide_rows = node("Cast", [node("Unsqueeze", [rows, constant("two", [2])], "ur")], "rows64", to=7)
    seen = node("LessOrEqual", [columns, wide_rows], "seen")  # (1, rows, columns)
    seen = node("Unsqueeze", [seen, constant("axis1", [1])], "seen4")
    for layer in range(LAYERS):
        parts = {}
        for name in "qkv":
            y = node("MatMul", [x, f"{name}{layer}"], f"{name}{layer}m")
            y = node("Reshape", [y, constant("split", [0, 0, HEADS, DIM])], f"{name}{layer}r")
            parts[name] = node("Transpose", [y], f"{name}{layer}t", perm=[0, 2, 1, 3])
        for name, kind in (("k", "key"), ("v", "value")):
            names = [f"{past % layer}.{kind}", parts[name]]
            parts[name] = node("Concat", names, f"{present % layer}.{kind}", axis=2)
        turned = node("Transpose", [parts["k"]], f"kt{layer}", perm=[0, 1, 3, 2])
        scores = node("MatMul", [parts["q"], turned], f"s{layer}")
        scores = node("Mul", [scores, constant("scale", SCALE, np.float32)], f"ss{layer}")
        scores = node("Where", [seen, scores, constant("minus", -1e9, np.float32)], f"sw{layer}")
        mixed = node("MatMul", [node("Softmax", [scores], f"sm{layer}"), parts["v"]], f"mx{layer}")
        mixed = node("Transpose", [mixed], f"mt{layer}", perm=[0, 2, 1, 3])
        mixed = node("Reshape", [mixed, constant("join", [0, 0, HIDDEN])], f"mr{layer}")
        x = node("Add", [x, node("MatMul", [mixed, f"o{layer}"], f"om{layer}")], f"x{layer + 1}")
    ends = constant("many", [LONGEST * 2])
    if keeps_rows or last_row_only:
        starts = constant("minus1", [-1])
        if keeps_rows:
            starts = node("Unsqueeze", [node("Neg", ["num_logits_to_keep"], "nk"), constant("a0", [0])], "st")
        x = node("Slice", [x, starts, ends, constant("axis", [1])], "kept")
    node("MatMul", [x, node("Transpose", ["embedding"], "et", perm=[1, 0])], "logits")

    def value(name: str, kind: int, shape: list[object]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        value("input_ids", id_type, ["batch", "length"]),
        value("attention_mask", id_type, ["batch", "total"]),
        value("position_ids", id_type, ([3] if position_rank == 3 else []) + ["batch", "length"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", 1 if last_row_only else "length", VOCABULARY])]
    if keeps_rows:
        inputs.append(value("num_logits_to_keep", TensorProto.INT64, []))
    if extra_input:
        inputs.append(value(extra_input, TensorProto.FLOAT, ["batch"]))
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            shape = ["batch", HEADS, "past", DIM]
            inputs.append(value(f"{past % layer}.{kind}", TensorProto.FLOAT, shape))
            outputs.append(value(f"{present % layer}.{kind}", TensorProto.FLOAT, shape))
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def save_decoder(folder: Path, name: str = "model.onnx", **switches: object) -> Path:
    """Write the decoder into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(make_decoder(**switches), folder / name)
    return folder
