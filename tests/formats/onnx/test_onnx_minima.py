"""Weights with a minimum in each group, as GGUF's q4_1 has: right in every engine, and read back exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.devices.reference import compile_session
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.onnx.read import read_onnx_checkpoint
from nybble.formats.onnx.targets import TARGETS
from nybble.formats.onnx.write import write_onnx_folder
from support.affine_models import checkpoint_with_minima
from support.onnx_runs import onnx_families, run_steps, session
from support.random_checkpoints import random_checkpoint, relative_error, run, tokens

FAMILIES = {
    name: replace(config, intermediate_size=128)
    for name, config in onnx_families().items()
    if name in ("llama", "qwen2", "qwen3", "phi3", "gemma3")
}
KINDS = ("int4_g32_f32_m", "int8_g32_f32_m")


def checkpoint_of(family: str, kind: str = KINDS[0], *, tied: bool | None = None) -> Checkpoint:
    config = FAMILIES[family]
    if tied is not None:
        config = replace(config, tie_word_embeddings=tied)
    # Codes of five bits, as q5_k has them, where a byte holds one.
    return checkpoint_with_minima(random_checkpoint(config), kind, 31 if kind.startswith("int8") else None)


def assert_same_bytes(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].encoding == tensor.encoding, name
        assert found.tensors[name].data.tobytes() == tensor.data.tobytes(), name


class Evaluator:
    """ONNX's reference evaluator with an InferenceSession's methods."""

    def __init__(self, folder: Path) -> None:
        self._evaluator = ReferenceEvaluator(onnx.load(folder / "model.onnx"))
        self._like = session_of(folder)
        self.get_inputs, self.get_outputs = self._like.get_inputs, self._like.get_outputs

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found: list[np.ndarray] = self._evaluator.run(names, feed)
        return found


def session_of(folder: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime with float activations, also where it makes MatMulNBits by itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    path = str(folder / "model.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-portable"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_and_read_back(family: str, kind: str, target: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family, kind)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    expected = run(compile_session(checkpoint), tokens(12))
    found = run_steps(session_of(tmp_path), checkpoint.config, tokens(12), (8, 1))
    assert relative_error(found, expected) < 1e-5
    assert_same_bytes(read_onnx_checkpoint(tmp_path), checkpoint)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_portable_passes_the_checker_and_the_evaluator(kind: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("qwen3", kind, tied=tied)
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    path = tmp_path / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert all(node.domain == "" for node in model.graph.node)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shaped = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert all(output in shaped for node in model.graph.node for output in node.output)
    expected = run(compile_session(checkpoint), tokens(9))
    found = run_steps(Evaluator(tmp_path), checkpoint.config, tokens(9), (6, 1))
    assert relative_error(found, expected) < 1e-5
    assert_same_bytes(read_onnx_checkpoint(tmp_path), checkpoint)


@pytest.mark.parametrize("target", ["onnx-cpu-int4", "onnx-cuda-fp16", "onnx-dml-int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_targets(tied: bool, target: str, tmp_path: Path) -> None:
    """Scales and minima of the target's type; the same bytes where they are of that type already."""
    kind = f"int4_g32_{TARGETS[target].element_type}_m"
    checkpoint = checkpoint_of("llama", kind, tied=tied)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    expected = run(compile_session(checkpoint), tokens(12))
    found = run_steps(session(tmp_path), checkpoint.config, tokens(12), (8, 1))
    assert relative_error(found, expected) < (4e-2 if TARGETS[target].accuracy_level else 2e-2)
    again = read_onnx_checkpoint(tmp_path)
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2:
            assert again.tensors[name].encoding.name == kind
            assert again.tensors[name].data.tobytes() == tensor.data.tobytes(), name


def test_codes_of_a_whole_byte_and_larger_groups(tmp_path: Path) -> None:
    """The middle is that of the codes that occur."""
    checkpoint = checkpoint_with_minima(random_checkpoint(FAMILIES["llama"]), "int8_g64_f32_m")
    write_onnx_folder(checkpoint, tmp_path, target="onnx-cpu-fp32")
    stored = {item.name: item for item in onnx.load(tmp_path / "model.onnx").graph.initializer}
    middle = stored["model.layers.0.mlp.down_proj.MatMul.weight_middle"]
    assert onnx.numpy_helper.to_array(middle).item() == 128
    expected = run(compile_session(checkpoint), tokens(12))
    found = run_steps(session_of(tmp_path), checkpoint.config, tokens(12))
    assert relative_error(found, expected) < 1e-5
    assert_same_bytes(read_onnx_checkpoint(tmp_path), checkpoint)


def test_sums_are_shared_and_centres_are_folded(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("llama")
    layers = checkpoint.config.num_hidden_layers
    write_onnx_folder(checkpoint, tmp_path, target="onnx-cpu-fp32")
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node]
    # One for q, k and v, one for the attention's output, gate with up, down; one for the logits.
    assert len([name for name in names if "/block_sums_32/ReduceSum" in name]) == 4 * layers + 1
    session_of(tmp_path, tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    made = {output for node in graph.node for output in node.output}
    assert not [name for name in made if "/centres/" in name]
    stored = {item.name for item in graph.initializer}
    assert not [name for name in stored if name.endswith(("_minima", "_middle"))]


def test_onnx_runtime_fuses_portable_weights_with_minima(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("gemma3")
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    session_of(tmp_path, tmp_path / "optimized.onnx")
    names = [
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    ]
    assert names.count("MatMulNBits") == 7 * checkpoint.config.num_hidden_layers + 1
    assert "DequantizeLinear" not in names


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-portable"])
@pytest.mark.parametrize("defect", ["scales", "middle", "axis", "sums", "input"])
def test_what_only_looks_like_ours_is_not_recognised(defect: str, target: str, tmp_path: Path) -> None:
    """One thing differs, so that the model computes something else: refused, never read wrong."""
    checkpoint = checkpoint_of("llama")
    write_onnx_folder(checkpoint, tmp_path, target=target)
    path = tmp_path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    prefix = "/model/layers.0/mlp/down_proj"
    if defect == "scales":
        other = nodes["/model/layers.1/mlp/down_proj/centres/Mul"].input[0]
        nodes[f"{prefix}/centres/Mul"].input[0] = other
    elif defect == "middle":
        item = next(
            i for i in model.graph.initializer if i.name.endswith("0.mlp.down_proj.MatMul.weight_middle")
        )
        item.CopyFrom(onnx.numpy_helper.from_array(np.array(7.5, np.float32), item.name))
    elif defect == "axis":
        node = next(node for node in model.graph.node if node.op_type == "ReduceSum")
        constant = next(n for n in model.graph.node if node.input[1] in n.output)
        constant.attribute[0].t.raw_data = np.array([-2], np.int64).tobytes()
    elif defect == "sums":
        nodes[f"{prefix}/Add_centres"].input[1] = nodes[f"{prefix}/Add_centres"].input[0]
    else:
        nodes["/model/layers.0/attn/o_proj/Add_centres"].op_type = "Sub"
    path.write_bytes(model.SerializeToString())
    with pytest.raises((UnsupportedError, FormatError)):
        read_onnx_checkpoint(tmp_path)
