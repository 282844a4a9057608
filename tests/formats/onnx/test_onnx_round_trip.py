"""What is written is read back: the same config, and the values that the file was given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.tensor import Tensor
from nybble.convert.choice import Choice
from nybble.convert.onnx_rules import OnnxRules
from nybble.convert.plan import make_plan
from nybble.errors import UnsupportedError
from nybble.formats.onnx.read import read_onnx_checkpoint
from nybble.formats.onnx.targets import TARGETS
from nybble.formats.onnx.write import write_onnx_folder
from nybble.graph.onnx import written_encodings
from support.onnx_runs import as_written, onnx_families, quantized
from support.random_checkpoints import random_checkpoint

FAMILIES = onnx_families()


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].dequantize(), tensor.dequantize(), err_msg=name)


def rounded(tensor: Tensor) -> Tensor:
    """What float16 keeps of norm weights, biases and embeddings."""
    values = tensor.dequantize().astype(np.float16).astype(np.float32)
    return tensor.changed(data=values.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_target(family: str, target: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    if TARGETS[target].element_type == "f16":
        # Floats that float16 holds, so that the file can keep them.
        tensors = {name: rounded(tensor) for name, tensor in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
    write_onnx_folder(checkpoint, tmp_path, target=target, method="rtn")
    assert_equal(read_onnx_checkpoint(tmp_path), as_written(checkpoint, target))


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-portable"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["int4_g32_f32", "int4_g16_f32_z", "int8_g32_f32", "int8_g64_f32_z"])
def test_integers(kind: str, tied: bool, target: str, tmp_path: Path) -> None:
    """The very bytes of the tensors, embedding included."""
    config = replace(FAMILIES["qwen3"], tie_word_embeddings=tied, intermediate_size=128)
    checkpoint = quantized(random_checkpoint(config), kind)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    found = read_onnx_checkpoint(tmp_path)
    assert_equal(found, checkpoint)
    for name, tensor in checkpoint.tensors.items():
        assert found.tensors[name].encoding == tensor.encoding
        assert found.tensors[name].data.tobytes() == tensor.data.tobytes(), name


@pytest.mark.parametrize("defect", ["node", "constant", "order"])
def test_an_embedding_that_only_looks_like_ours(defect: str, tmp_path: Path) -> None:
    """Node names prove nothing: what differs in one place is not taken for the pattern."""
    write_onnx_folder(random_checkpoint(FAMILIES["qwen2"]), tmp_path, target="onnx-portable-int4")
    path = tmp_path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    if defect == "node":
        nodes["/model/embed_tokens/codes/Where"].input[:] = list(
            reversed(nodes["/model/embed_tokens/codes/Where"].input)
        )
    elif defect == "constant":
        constant = next(node for node in model.graph.node if node.output[0] == "/model/constants/u8/15")
        constant.attribute[0].t.raw_data = b"\x07"
    else:
        nodes["/model/embed_tokens/scales/Transpose"].attribute[0].ints[:] = [2, 1, 0]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError):
        read_onnx_checkpoint(tmp_path)


@pytest.mark.parametrize("target", ["onnx-cpu-int4", "onnx-cuda-int4", "onnx-portable-int4", "onnx-cpu-fp32"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_plan_of_a_conversion_says_what_is_written(family: str, target: str, tmp_path: Path) -> None:
    """A tied embedding is rounded with the output matrix, and the plan knows; a half-precision one stays."""
    checkpoint = random_checkpoint(FAMILIES[family], embeddings="bf16")
    plans = make_plan(checkpoint, OnnxRules(TARGETS[target]), Choice())
    found = {name: row.name for name, row in written_encodings(checkpoint, TARGETS[target]).items()}
    assert found == {plan.tensor.name: plan.target.name for plan in plans if plan.tensor.name in found}
    write_onnx_folder(checkpoint, tmp_path, target=target)
    assert read_onnx_checkpoint(tmp_path).tensors.keys() == checkpoint.tensors.keys()
