"""The config that nybble's files state: believed where the graph computes it, and not needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import RopeConfig
from nybble.formats.onnx.read import CONFIG_KEY, read_onnx_checkpoint
from nybble.formats.onnx.write import write_onnx_folder
from support.tiny_models import LLAMA, PHI3, tiny_checkpoint

onnx = pytest.importorskip("onnx")

SCALED = RopeConfig(
    500000.0, 8, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "phi3": PHI3,
    "scaled": replace(LLAMA, rope=SCALED),
    "odd": replace(LLAMA, rms_norm_eps=1e-5, attention_scale=0.2, logit_softcap=20.0),
    "windowed": replace(
        LLAMA, architecture="mistral", sliding_window=5, layer_types=("sliding_attention",) * 2
    ),
}


def state(folder: Path, text: str | None) -> None:
    """Replaces the stated config, or takes it out."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    kept = [entry for entry in model.metadata_props if entry.key != CONFIG_KEY]
    assert len(kept) < len(model.metadata_props)
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if text is not None:
        model.metadata_props.add(key=CONFIG_KEY, value=text)
    path.write_bytes(model.SerializeToString())


def stated(folder: Path) -> dict[str, object]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    found: dict[str, object] = json.loads(next(e.value for e in model.metadata_props if e.key == CONFIG_KEY))
    return found


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.config == other.config
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert other.tensors[name].encoding == tensor.encoding
        assert np.array_equal(other.tensors[name].data, tensor.data), name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_alone_tells_everything(name, tmp_path):
    checkpoint = tiny_checkpoint(CONFIGS[name])
    write_onnx_folder(checkpoint, tmp_path, target="onnx-portable")
    assert_same(checkpoint, read_onnx_checkpoint(tmp_path))
    state(tmp_path, None)
    assert_same(checkpoint, read_onnx_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 0.1},
        {"num_attention_heads": 2},
        {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": -1},
        {"architecture": 5},
    ],
)
def test_what_the_graph_does_not_compute_is_not_believed(change, tmp_path):
    write_onnx_folder(tiny_checkpoint(LLAMA), tmp_path, target="onnx-portable")
    state(tmp_path, json.dumps({**stated(tmp_path), **change}))
    assert read_onnx_checkpoint(tmp_path).config == LLAMA


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"rope": 1}', '{"rope": {"x": 1}}', '{"a": 1}', "1" * 9999, "[" * 100000]
)
def test_what_is_no_config_is_ignored(text, tmp_path):
    write_onnx_folder(tiny_checkpoint(LLAMA), tmp_path, target="onnx-portable")
    state(tmp_path, text)
    assert read_onnx_checkpoint(tmp_path).config == LLAMA
