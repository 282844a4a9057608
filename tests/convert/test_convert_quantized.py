"""AWQ, GPTQ and compressed-tensors folders: into each other, into ONNX and into GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.checkpoint.encodings.affine import AffineFormat
from nybble.convert.convert import convert
from nybble.errors import ConversionError
from nybble.formats.huggingface.writer import write_huggingface_folder
from nybble.loading import read_checkpoint
from support.affine_models import affine_checkpoint
from support.conversions import logits, model_file
from support.random_checkpoints import LLAMA, largest_difference, rope, tokens

CONFIG = replace(
    LLAMA, hidden_size=128, intermediate_size=256, head_dim=32, rope=rope(32), num_hidden_layers=2
)
SYMMETRIC = AffineFormat(4, 32, "f16", False)
WITH_ZEROS = AffineFormat(4, 128, "f16", True)
METHODS = {
    "awq": (WITH_ZEROS, False),
    "gptq": (AffineFormat(4, 128, "f16", False), False),
    "gptq-act-order": (AffineFormat(4, 128, "f16", False), True),
    "compressed-tensors": (SYMMETRIC, False),
}


def folder_of(name: str, path: Path) -> Path:
    form, act_order = METHODS[name]
    checkpoint = affine_checkpoint(form, CONFIG, act_order=act_order)
    path.mkdir()
    write_huggingface_folder(checkpoint, path, quantization=name.removesuffix("-act-order"))
    return path


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_into_gguf(name: str, tmp_path: Path) -> None:
    source = folder_of(name, tmp_path / "source")
    if name == "gptq-act-order":
        with pytest.raises(ConversionError, match="act-order"):
            convert(source, tmp_path / "x.gguf", to="gguf")
        report = convert(source, tmp_path / "x.gguf", to="gguf", encoding="f32")
        assert len(report.notes) == 1
    else:
        report = convert(source, tmp_path / "x.gguf", to="gguf")
        kinds = {t.target for t in report.tensors if t.name.endswith("_proj.weight")}
        assert kinds <= {"q4_0", "q4_1", "q5_0"}, "four bits do not become eight"
    assert report.relation == "exact"
    assert largest_difference(logits(tmp_path / "x.gguf"), logits(source)) < 1e-5


def test_settings_that_are_not_used_are_noted(tmp_path: Path) -> None:
    source = folder_of("compressed-tensors", tmp_path / "source")
    file = source / "config.json"
    config = json.loads(file.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    file.write_text(json.dumps(config))
    report = convert(source, tmp_path / "x.gguf", to="gguf")
    assert report.notes == ("input_activations of the source's quantization_config is not used",)


def test_into_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    source = folder_of(name, tmp_path / "source")
    report = convert(source, tmp_path / "onnx", to="onnx")
    assert report.relation == "exact"
    kinds = {t.target for t in report.tensors if t.name.endswith("_proj.weight")}
    assert all(kind.startswith("int4") for kind in kinds)
    pytest.importorskip("onnxruntime")
    model = nybble.load(tmp_path / "onnx", device="onnxruntime:cpu")
    assert largest_difference(model.logits(tokens(12)), logits(source)) < 1e-4


def test_into_safetensors_again(name: str, tmp_path: Path) -> None:
    source = folder_of(name, tmp_path / "source")
    report = convert(source, tmp_path / "again", to="safetensors")
    assert report.relation == "exact"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


def test_into_plain_numbers(name: str, tmp_path: Path) -> None:
    source = folder_of(name, tmp_path / "source")
    if name == "gptq-act-order":
        pytest.skip("its columns stay in their order")
    report = convert(source, tmp_path / "plain", to="safetensors", encoding="f32")
    assert report.relation == "exact"
    assert {t.encoding.name for t in read_checkpoint(tmp_path / "plain").tensors.values()} == {"f32"}
    assert largest_difference(logits(tmp_path / "plain"), logits(source)) < 1e-5


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_blocks_of_gguf_into_every_packing(method: str, tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="q4_0")
    report = convert(source, tmp_path / "folder", to="safetensors", quantization=method)
    assert report.relation == "exact"
    assert largest_difference(logits(tmp_path / "folder"), logits(source)) < 1e-5
    convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_plain_numbers_are_quantized_when_asked_to(method: str, tmp_path: Path) -> None:
    source = model_file(tmp_path / "model.gguf", weights="f16", embeddings="f16")
    kind = "int4_g128_f16" + ("_z" if method == "awq" else "")
    report = convert(
        source, tmp_path / "folder", to="safetensors", quantization=method, encodings={"*_proj.weight": kind}
    )
    assert {t.target for t in report.tensors if t.relation == "lossy"} == {kind}
    written = read_checkpoint(tmp_path / "folder")
    assert written.tensors["model.layers.0.mlp.up_proj.weight"].encoding.name == kind
    for tensor in report.tensors:
        got = written.tensors[tensor.name].dequantize()
        meant = read_checkpoint(source)  # its q and k lie otherwise
        if "q_proj" in tensor.name or "k_proj" in tensor.name:
            continue
        error = np.abs(got - meant.tensors[tensor.name].dequantize()).max()
        assert tensor.max_error == pytest.approx(error, rel=1e-5)
