"""The portable form: standard operators only, right in ONNX Runtime and in ONNX's reference evaluator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from nybble.devices.reference import compile_session
from nybble.formats.onnx.write import write_onnx_folder
from support.onnx_runs import as_written, quantized, run_steps
from support.random_checkpoints import FAMILIES, random_checkpoint, relative_error, run, tokens

TOLERANCE = 1e-5
"""float32 everywhere: 2 ** -24 at each of some hundred operations."""
CASES = {
    name: replace(config, rms_norm_offset=0.0)
    for name, config in FAMILIES.items()
    if not config.rope.interleaved
}
TARGETS = ("onnx-portable", "onnx-portable-int4")


@dataclass
class _Item:
    name: str
    type: str


class Evaluator:
    """ONNX's reference evaluator with an InferenceSession's methods."""

    def __init__(self, folder: Path) -> None:
        self._model = onnx.load(folder / "model.onnx")
        self._evaluator = ReferenceEvaluator(self._model)

    def get_inputs(self) -> list[_Item]:
        kinds = {onnx.TensorProto.FLOAT: "tensor(float)", onnx.TensorProto.INT64: "tensor(int64)"}
        return [_Item(item.name, kinds[item.type.tensor_type.elem_type]) for item in self._model.graph.input]

    def get_outputs(self) -> list[_Item]:
        return [_Item(item.name, "") for item in self._model.graph.output]

    def run(self, names: None, feed: dict[str, Any]) -> Any:
        return self._evaluator.run(names, feed)


def runtime(folder: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime without int8 activations, which it would choose for int4 weights by itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", CASES)
def test_checked_and_right_in_both_engines(family: str, target: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(CASES[family])
    write_onnx_folder(checkpoint, tmp_path, target=target)
    path = tmp_path / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert all(node.domain == "" for node in model.graph.node)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shaped = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert all(output in shaped for node in model.graph.node for output in node.output)
    names = [node.op_type for node in model.graph.node]
    assert names.count("Attention") == checkpoint.config.num_hidden_layers
    assert (names.count("DequantizeLinear") == names.count("MatMul")) == (target == TARGETS[1])
    ids = tokens(16)
    expected = run(compile_session(as_written(checkpoint, target)), ids)
    for engine in (runtime(tmp_path), Evaluator(tmp_path)):
        actual = run_steps(engine, checkpoint.config, ids, (12, 1, 1))
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["int2_g32_f16_z", "int4_g32_f16", "int4_g16_f32_z", "int4_g64_bf16", "int8_g32_f16", "int8_g32_f32_z"],
)
def test_integers_are_packed_exactly(kind: str, tied: bool, tmp_path: Path) -> None:
    """Linears, output matrix and embedding: every kind of codes, zero points and odd sizes."""
    config = replace(CASES["qwen2"], tie_word_embeddings=tied, intermediate_size=128)
    checkpoint = quantized(random_checkpoint(config), kind)
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    expected = run(compile_session(checkpoint), tokens(9))
    for engine in (runtime(tmp_path), Evaluator(tmp_path)):
        assert relative_error(run_steps(engine, config, tokens(9), (6, 1)), expected) < TOLERANCE


def test_onnx_runtime_fuses_int4_weights(tmp_path: Path) -> None:
    """Each DequantizeLinear and its MatMul become MatMulNBits, the tied output matrix too."""
    checkpoint = random_checkpoint(CASES["gemma3"])
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable-int4")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    names = [node.op_type for node in model.graph.node]
    assert names.count("MatMulNBits") == 7 * checkpoint.config.num_hidden_layers + 1
    assert "DequantizeLinear" not in names


@pytest.mark.parametrize("family", ["phi3-longrope", "phi3-longrope-window"])
def test_longrope_and_padding_in_one_batch(family: str, tmp_path: Path) -> None:
    """A short sequence, padded on the left, and a long one: each gets its own factors and window."""
    checkpoint = random_checkpoint(CASES[family])
    config = checkpoint.config
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    lengths, size = (40, 41), 41
    rows = [tokens(length, seed=length) for length in lengths]
    ids = np.array([[0] * (size - len(row)) + row for row in rows], np.int64)
    mask = np.array([[0] * (size - length) + [1] * length for length in lengths], np.int64)
    feed: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
    }
    shape = (2, config.num_key_value_heads, 0, config.head_dim)
    for layer in range(config.num_hidden_layers):
        feed |= {f"past_key_values.{layer}.{kind}": np.zeros(shape, np.float32) for kind in ("key", "value")}
    reference = compile_session(checkpoint)
    for engine in (runtime(tmp_path), Evaluator(tmp_path)):
        logits = engine.run(None, feed)[0]
        for row, found in zip(rows, logits, strict=True):
            assert relative_error(found[size - len(row) :], run(reference, row)) < TOLERANCE


def test_long_sequences_decode(tmp_path: Path) -> None:
    """Past LongRoPE's limit, from a prompt that was long already."""
    checkpoint = random_checkpoint(CASES["phi3-longrope"])
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    ids = tokens(50)
    expected = run(compile_session(checkpoint), ids)
    actual = run_steps(runtime(tmp_path), checkpoint.config, ids, (45, 1, 1))
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_embedding(kind: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(CASES["llama"], embeddings=kind)
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    expected = run(compile_session(checkpoint), tokens(9))
    for engine in (runtime(tmp_path), Evaluator(tmp_path)):
        assert relative_error(run_steps(engine, checkpoint.config, tokens(9), (6, 1)), expected) < TOLERANCE
