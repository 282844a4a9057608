"""GPTQ's act-order through ONNX: a linear's inputs come permuted, in a Gather before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import to_onnx_form
from nybble.checkpoint.tensor import Tensor
from nybble.devices import reference
from nybble.formats.onnx.read import read_onnx_checkpoint
from nybble.formats.onnx.write import write_onnx_folder
from support.onnx_runs import as_written
from support.random_checkpoints import FAMILIES, largest_difference, random_checkpoint, run, tokens


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("target", ["onnx-cpu-int4", "onnx-portable-int4"])
def test_permutations_come_back(family: str, target: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    random = np.random.default_rng(0)
    row = encoding("int4_g32_f32")
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        tensors[name] = tensor
        if "_proj" in name and len(tensor.shape) == 2:
            assert row.quantize is not None
            tensors[name] = tensor.changed(encoding=row, data=row.quantize(tensor.dequantize()))
            key = name.replace(".weight", ".input_permutation")
            order = random.permutation(tensor.shape[1]).astype("<i4")
            tensors[key] = Tensor(key, order.shape, encoding("i32"), order.view(np.uint8))
    checkpoint.tensors = tensors
    checkpoint = to_onnx_form(checkpoint)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    found = read_onnx_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        if name.endswith("input_permutation"):
            np.testing.assert_array_equal(found.tensors[name].data, tensor.data)
    ids = tokens(20)
    expected = run(reference.compile_session(as_written(checkpoint, target)), ids)
    assert largest_difference(run(reference.compile_session(found), ids), expected) < 1e-5
