"""``nybble inspect`` and ``nybble devices``: facts, printed safely, without reading weights."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from nybble import loading
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import ENCODINGS
from nybble.checkpoint.tensor import Tensor
from nybble.devices.report import device_reports

pytest.importorskip("nybble._core", reason="the native core is not built")


def tensor(name, shape, encoding):
    encoding = ENCODINGS[encoding]
    return Tensor(name, shape, encoding, np.zeros(encoding.nbytes(int(np.prod(shape))), np.uint8))


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """A small model behind every name."""
    tensors = [
        tensor("model.embed_tokens.weight", (100, 64), "q8_0"),
        tensor("model.layers.0.mlp.up_proj.weight", (128, 64), "q4_1"),
        tensor("model.layers.0.mlp.gate_proj.weight", (128, 64), "q4_1"),
        tensor("model.norm.weight", (64,), "f32"),
    ]
    value = Checkpoint(
        config=ModelConfig(
            architecture="llama",
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=2048,
            rope=RopeConfig(theta=10000.0, rotary_dim=16),
            layer_types=("full_attention",) * 6 + ("sliding_attention",) * 2,
        ),
        tensors={t.name: t for t in tensors},
        chat_template="{{ messages }}\n\x1b[31mred",
        metadata={
            "general.name": "a\x1b[2Jb",
            "tokens": ["x"] * 100,
            "scores": np.zeros(100, np.float32),
            "temperature": np.float32(0.5),
            "long": "y" * 1000,
            "nothing": float("inf"),
        },
        format="gguf",
        name="Tiny",
    )
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"")
    monkeypatch.setattr(loading, "read_checkpoint", lambda path: value)
    return value, str(path)


def test_summary(nybble_command, checkpoint):
    _, path = checkpoint
    out = nybble_command("inspect", path).out
    lines = [line.split() for line in out.splitlines()]
    assert ["name", "Tiny"] in lines
    assert ["parameters", "22.8", "k"] in lines
    assert ["rope", "theta", "10000,", "rotary_dim", "16"] in lines
    assert ["layer_types", "6", "x", "full_attention,", "2", "x", "sliding_attention"] in lines
    assert "rms_norm_eps" not in out  # what has its default value is left out
    by_encoding = {words[0]: words[1:] for words in lines if words and words[0] in ENCODINGS}
    assert by_encoding["q4_1"][:6] == ["2", "16.4", "k", "10.2", "kB", "5"]
    assert by_encoding["f32"] == ["1", "64", "256", "B", "32", "-"]
    assert "int8" in " ".join(by_encoding["q4_1"])


def test_tensors(nybble_command, checkpoint):
    _, path = checkpoint
    header, *rows = nybble_command("inspect", path, "--tensors").out.splitlines()
    assert header.split() == ["NAME", "SHAPE", "ENCODING", "SIZE"]
    assert rows[0].split() == ["model.embed_tokens.weight", "100", "x", "64", "q8_0", "6.8", "kB"]
    assert len(rows) == 4


def test_metadata_is_short_and_harmless(nybble_command, checkpoint):
    _, path = checkpoint
    out = nybble_command("inspect", path, "--metadata").out
    assert "a\\x1b[2Jb" in out
    assert "['x', 'x', 'x', 'x', ...] (100 values)" in out
    assert "[0.0, 0.0, 0.0, 0.0, ...] (100 values)" in out
    assert max(map(len, out.splitlines())) < 130


def test_template_is_exact_in_a_pipe(nybble_command, checkpoint):
    _, path = checkpoint
    assert nybble_command("inspect", path, "--template").out == "{{ messages }}\n\x1b[31mred\n"


def test_template_does_not_drive_a_terminal(nybble_command, checkpoint, monkeypatch):
    _, path = checkpoint
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert nybble_command("inspect", path, "--template").out == "{{ messages }}\n\\x1b[31mred\n"


def test_no_template(nybble_command, checkpoint):
    value, path = checkpoint
    value.chat_template = None
    result = nybble_command("inspect", path, "--template")
    assert (result.code, result.out) == (1, "")
    assert result.err == "nybble: error: the model has no chat template\n"
    assert "none: use run --raw" in nybble_command("inspect", path).out


def test_json(nybble_command, checkpoint):
    _, path = checkpoint
    value = json.loads(nybble_command("inspect", path, "--json").out)
    assert value["config"]["hidden_size"] == 64
    assert value["tensors"][3] == {
        "name": "model.norm.weight",
        "shape": [64],
        "encoding": "f32",
        "nbytes": 256,
    }
    assert value["parameters"] == 6400 + 2 * 8192 + 64
    assert value["bits_per_weight"] == pytest.approx(8 * value["nbytes"] / value["parameters"])
    assert [total["name"] for total in value["encodings"]] == ["q4_1", "q8_0", "f32"]
    assert value["metadata"]["tokens"] == {"length": 100}
    assert value["metadata"]["scores"] == {"length": 100}
    assert value["metadata"]["temperature"] == 0.5
    assert value["metadata"]["nothing"] == "inf"


def test_one_part_at_a_time(nybble_command, checkpoint):
    assert nybble_command("inspect", checkpoint[1], "--tensors", "--json").code == 2


def test_devices(nybble_command):
    out = nybble_command("devices").out
    assert out.startswith("cpu: chosen: the default device\n")
    assert "  processor " in out
    levels = json.loads(nybble_command("devices", "--json").out)[0]["instruction_sets"]
    assert [level["name"] for level in levels if level["chosen"]] == [
        level["name"] for level in levels if not level["why_not"]
    ][-1:]
    for level in levels:
        assert f"    {level['name']} " in out


def nybble_process(*argv, **environment):
    import os

    command = [sys.executable, "-m", "nybble", *argv]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_lower_level_on_request():
    report = json.loads(nybble_process("devices", "--json", NYBBLE_ISA="portable").stdout)[0]
    assert report["facts"]["isa"] == "portable"
    if len([level for level in report["instruction_sets"] if not level["why_not"]]) > 1:
        assert report["facts"]["isa_reason"].startswith("NYBBLE_ISA asks for it; ")


def test_an_unknown_level_is_refused():
    result = nybble_process("devices", NYBBLE_ISA="sse9")
    assert result.returncode == 1
    assert result.stderr.startswith("nybble: error: NYBBLE_ISA=sse9 is unknown; levels are portable")


def test_default_device_comes_first():
    reports = device_reports()
    assert [report.name for report in reports if report.chosen] == ["cpu"]


def test_an_adapter(nybble_command, tmp_path):
    from nybble.formats.huggingface.adapter import write_peft_adapter
    from support.adapters import random_adapter
    from support.random_checkpoints import LLAMA

    folder = tmp_path / "pirate"
    folder.mkdir()
    write_peft_adapter(random_adapter(LLAMA, only=("q_proj.weight", "up_proj.weight")), folder)
    out = nybble_command("inspect", str(folder)).out
    assert "LoRA adapter" in out and "3 x up_proj, 3 x q_proj" in out and "not said" in out
    lines = nybble_command("inspect", str(folder), "--tensors").out.splitlines()
    assert len(lines) == 7 and lines[1].split() == [
        "model.layers.0.mlp.up_proj.weight", "4", "2", "4", "x", "64", "96", "x", "4", "f32",
    ]  # fmt: skip
    found = json.loads(nybble_command("inspect", str(folder), "--json").out)
    assert found["parameters"] == 3 * 4 * (64 + 64 + 64 + 96) and len(found["pairs"]) == 6
    assert "lora_alpha" in nybble_command("inspect", str(folder), "--metadata").out
    result = nybble_command("inspect", str(folder), "--template")
    assert result.code == 1 and "no chat template" in result.err
