"""ONNX's own operator tests: for our operators' definitions, and for the runtime that runs what we write.

The first half applies ``graph/reference.py`` to the inputs of ONNX's tests of the operators that ours
expand to: both must mean the same. The second half runs the tests of every standard operator in our
graphs, as far as we use it, in ONNX Runtime.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nybble.checkpoint.encodings.affine import AffineParts, affine_encoding, affine_format, join
from nybble.formats.onnx.targets import TARGETS
from nybble.formats.onnx.write import write_onnx_folder
from nybble.graph import reference
from support.onnx_runs import onnx_families
from support.random_checkpoints import random_checkpoint

Arrays = list[np.ndarray]
Case = tuple[str, onnx.ModelProto, list[tuple[Arrays, Arrays]], float]


@cache
def all_cases() -> Mapping[str, list[Case]]:
    """ONNX's tests of single nodes, by operator: name, model, inputs and outputs, tolerance."""
    from onnx.backend.test.case.node import collect_testcases

    result: dict[str, list[Case]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests overflow on purpose
        cases = collect_testcases(None)
    for case in cases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and not nodes[0].domain:
            sets = [(list(inputs), list(outputs)) for inputs, outputs in case.data_sets]
            result.setdefault(nodes[0].op_type, []).append((case.name, case.model, sets, case.rtol))
    return result


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


# -- our operators' definitions ----------------------------------------------------------------------
# Each takes the node's inputs by name and its attributes, and returns the outputs that it can tell, or
# None where the test asks for more than our operator means.


def rms_normalization(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    values = x["X"]
    if attributes.get("axis", -1) not in (-1, values.ndim - 1) or values.dtype != np.float32:
        return None
    flat = values.reshape(-1, values.shape[-1])
    eps = attributes.get("epsilon", 1e-5)
    return [reference.rms_norm(flat, x["W"], eps, 0.0, flat.shape[1]).reshape(values.shape)]


def rotary_embedding(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    values, cos, sin = x["input"], x["cos_cache"], x["sin_cache"]
    if "position_ids" in x:
        cos, sin = cos[x["position_ids"]], sin[x["position_ids"]]
    tokens_first = values.ndim == 3
    heads = attributes.get("num_heads", 0) if tokens_first else values.shape[1]
    four = values.reshape(*values.shape[:2], heads, -1) if tokens_first else values.transpose(0, 2, 1, 3)
    interleaved = bool(attributes.get("interleaved", 0))
    half = (attributes.get("rotary_embedding_dim", 0) or four.shape[-1]) // 2
    result = four.copy()
    # The tests' cosines and sines are random numbers: each pair has an angle and a factor of its own.
    for batch, token, pair in np.ndindex(*four.shape[:2], half):
        places = [2 * pair, 2 * pair + 1] if interleaved else [pair, pair + half]
        c, s = float(cos[batch, token, pair]), float(sin[batch, token, pair])
        result[batch, token][:, places] = reference.rotary(
            four[batch, token][:, places],
            np.ones(heads, np.int64),
            np.array([math.atan2(s, c)], np.float32),
            math.hypot(s, c),
            head_dim=2,
            interleaved=interleaved,
        )
    return [result.reshape(values.shape) if tokens_first else result.transpose(0, 2, 1, 3)]


def attention(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    known = {"is_causal", "scale", "softcap", "q_num_heads", "kv_num_heads"}
    if attributes.keys() - known or x["Q"].dtype != np.float32:
        return None
    if x.keys() & {"attn_mask", "nonpad_kv_seqlen"} or x["K"].shape[-1] != x["V"].shape[-1]:
        return None

    def four(name: str, heads: str) -> np.ndarray:
        value = x[name]
        if value.ndim == 4:
            return value
        count = attributes[heads]
        return value.reshape(*value.shape[:2], count, -1).transpose(0, 2, 1, 3)

    q, k, v = four("Q", "q_num_heads"), four("K", "kv_num_heads"), four("V", "kv_num_heads")
    past = x["past_key"].shape[2] if "past_key" in x else 0
    if past:
        k, v = np.concatenate([x["past_key"], k], axis=2), np.concatenate([x["past_value"], v], axis=2)

    def flat(item: np.ndarray) -> np.ndarray:
        return item.transpose(1, 0, 2).reshape(item.shape[1], -1)

    rows = []
    for q1, k1, v1 in zip(q, k, v, strict=True):
        # Ours is always causal with the last query at the last key: give each query the keys that it sees.
        sees = [past + i + 1 if attributes.get("is_causal") else k.shape[2] for i in range(q.shape[2])]
        out = [
            reference.attention(
                flat(q1[:, i : i + 1]),
                flat(k1[:, :n]),
                flat(v1[:, :n]),
                head_dim=q.shape[-1],
                scale=attributes.get("scale") or q.shape[-1] ** -0.5,
                softcap=attributes.get("softcap") or None,
            )
            for i, n in enumerate(sees)
        ]
        rows.append(np.concatenate(out))
    y = np.stack(rows)
    if x["Q"].ndim == 4:
        y = y.reshape(*y.shape[:2], q.shape[1], -1).transpose(0, 2, 1, 3)
    return [y, k, v] if past else [y]


def dequantize_linear(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    """Blocks along the last axis of unsigned codes: our group-wise integers."""
    codes, scale, size = x["x"], x["x_scale"], attributes.get("block_size", 0)
    if not size or codes.dtype != np.uint8 or "x_zero_point" not in x:
        return None
    moved = [np.moveaxis(item, attributes.get("axis", 1), -1) for item in (codes, scale, x["x_zero_point"])]
    columns, groups = moved[0].shape[-1], moved[1].shape[-1]
    form = affine_format(affine_encoding(8, size, "f32", zero_point=True).name)
    assert form is not None
    bits = np.ascontiguousarray(moved[1].reshape(-1, groups), np.float32).view(np.uint8)
    parts = AffineParts(
        np.ascontiguousarray(moved[0].reshape(-1, columns)),
        bits.reshape(-1, groups, 4),
        np.ascontiguousarray(moved[2].reshape(-1, groups)),
    )
    values = affine_encoding(8, size, "f32", zero_point=True).dequantize(join(parts, form))
    return [np.moveaxis(values.reshape(moved[0].shape), -1, attributes.get("axis", 1))]


def gelu(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    kind = "gelu_pytorch_tanh" if attributes.get("approximate") == b"tanh" else "gelu"
    flat = x["x"].astype(np.float32).reshape(1, -1)
    return [reference.gated_activation(flat, np.ones_like(flat), kind).reshape(x["x"].shape)]


def sigmoid(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    values = x["x"].astype(np.float32)
    values[values == 0] = 1e-3  # silu is x * sigmoid(x)
    return [reference.silu(values) / values]


def gather(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    data, indices = x["data"], x["indices"]
    if attributes.get("axis", 0) != 0 or indices.min() < 0:
        return None
    rows = reference.embedding(indices.reshape(-1), data.astype(np.float32).reshape(len(data), -1))
    return [rows.reshape(*indices.shape, *data.shape[1:])]


def matmul(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    if x["a"].ndim != 2 or x["b"].ndim != 2:
        return None
    return [reference.linear(x["a"].astype(np.float32), x["b"].T.astype(np.float32))]


def split(x: Mapping[str, Any], attributes: dict[str, Any]) -> Arrays | None:
    values = x["input"]
    if values.ndim != 2 or attributes.get("axis", 0) != 1 or "split" not in x:
        return None
    return list(reference.split(values, x["split"].tolist()))


DEFINITIONS: Mapping[str, Callable[[Mapping[str, Any], dict[str, Any]], Arrays | None]] = {
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Attention": attention,
    "DequantizeLinear": dequantize_linear,
    "Gelu": gelu,
    "Sigmoid": sigmoid,
    "Gather": gather,
    "MatMul": matmul,
    "Split": split,
}


CHECKED = {"Attention": 10, "RMSNormalization": 5, "RotaryEmbedding": 8, "Gelu": 4}
"""Tests that must at least apply, where there are many."""


@pytest.mark.slow
@pytest.mark.parametrize("op_type", DEFINITIONS)
def test_definitions(op_type: str) -> None:
    checked = 0
    for name, model, sets, tolerance in all_cases()[op_type]:
        node = model.graph.node[0]
        names = [item for item in node.input if item]
        for inputs, outputs in sets:
            found = DEFINITIONS[op_type](dict(zip(names, inputs, strict=True)), attributes_of(node))
            if found is None:
                continue
            for mine, expected in zip(found, outputs, strict=False):
                np.testing.assert_allclose(mine, expected, rtol=max(tolerance, 1e-3), atol=1e-5, err_msg=name)
            checked += 1
    assert checked >= CHECKED.get(op_type, 1), op_type


# -- the runtime -------------------------------------------------------------------------------------

OUR_TYPES = {
    TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.UINT8,
    TensorProto.INT8, TensorProto.UINT4, TensorProto.INT4,
}  # fmt: skip
"""Of inputs and outputs in the portable form."""
FOUR_BITS = {TensorProto.UINT4, TensorProto.INT4}
"""Only weights are: they go in as initializers, and nothing of them comes out."""
NOT_OURS: Mapping[str, str] = {
    "test_attention_4d_diff_heads_mask4d_padded_kv": "the mask is shorter than the keys; ours never is",
}
"""Tests that ONNX Runtime 1.31 fails and that ask for what we never write."""
OPSET = max(target.opset for target in TARGETS.values())


def used_operators(folder: Path) -> set[str]:
    """Standard operators of all our graphs."""
    found: set[str] = set()
    for family, config in onnx_families().items():
        for target in ("onnx-cpu-fp32", "onnx-dml-int4", "onnx-portable", "onnx-portable-int4"):
            path = folder / family / target
            write_onnx_folder(random_checkpoint(config), path, target=target, method="rtn")
            model = onnx.load(path / "model.onnx", load_external_data=False)
            nodes = list(model.graph.node)
            for node in model.graph.node:
                nodes += [inner for item in node.attribute if item.HasField("g") for inner in item.g.node]
            # SimplifiedLayerNormalization has no domain of its own, and is no standard operator.
            found |= {node.op_type for node in nodes if not node.domain} - {"SimplifiedLayerNormalization"}
    return found


def as_array(value: Any) -> np.ndarray:
    return onnx.numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def as_we_use_it(model: onnx.ModelProto) -> bool:
    """Whether a test stays within the types, inputs and attributes of our graphs."""
    node = model.graph.node[0]
    kinds = [value.type.tensor_type.elem_type for value in model.graph.input]
    results = [value.type.tensor_type.elem_type for value in model.graph.output]
    if not OUR_TYPES.issuperset(kinds + results) or FOUR_BITS & set(results):
        return False
    attributes = attributes_of(node)
    if node.op_type == "Attention":
        windows = any("window" in name for name in attributes)
        return len(node.output) <= 3 and len(node.input) <= 6 and not windows
    if node.op_type == "Mod":
        return kinds[0] == TensorProto.INT64 and not attributes.get("fmod", 0)
    if node.op_type == "BitShift":
        return kinds[0] == TensorProto.UINT8
    if node.op_type == "ReduceMax":
        return kinds[0] != TensorProto.BOOL
    return True


@pytest.mark.slow
def test_runtime(tmp_path: Path) -> None:
    used = used_operators(tmp_path)
    assert {"Attention", "RMSNormalization", "RotaryEmbedding", "DequantizeLinear", "If"} <= used
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    checked: dict[str, int] = dict.fromkeys(used, 0)
    failed = []
    for op_type in sorted(used):
        for name, model, sets, tolerance in all_cases().get(op_type, ()):
            if name in NOT_OURS or not as_we_use_it(model):
                continue
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            for entry in changed.opset_import:
                entry.version = min(entry.version, OPSET)  # newer versions only add types
            changed.ir_version = min(changed.ir_version, 13)
            for value, array in zip(model.graph.input, sets[0][0], strict=True):
                if value.type.tensor_type.elem_type in FOUR_BITS:
                    changed.graph.initializer.append(array)
                    changed.graph.initializer[-1].name = value.name
            try:
                session = onnxruntime.InferenceSession(
                    changed.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
                for inputs, outputs in sets:
                    inputs, outputs = (
                        [as_array(item) for item in inputs],
                        [as_array(item) for item in outputs],
                    )
                    feed = dict(zip((item.name for item in model.graph.input), inputs, strict=True))
                    names = [item.name for item in session.get_inputs()]
                    found = session.run(None, {name: feed[name] for name in names})
                    for mine, expected in zip(found, outputs, strict=True):
                        np.testing.assert_allclose(
                            np.asarray(mine, np.float64),
                            np.asarray(expected, np.float64),
                            rtol=max(tolerance, 1e-3),
                            atol=1e-6,
                        )
                checked[op_type] += 1
            except Exception as error:
                failed.append(f"{name}: {str(error)[:200]}")
    assert not failed, "\n".join(failed)
    none = {op_type for op_type, count in checked.items() if not count}
    assert not none, f"operators without a test: {none}"
