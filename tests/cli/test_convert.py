"""``nybble convert`` and ``nybble verify`` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.conversions import model_file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_file(tmp_path / "model.gguf")


def test_convert_and_verify(nybble_command, source, tmp_path):
    result = nybble_command("convert", str(source), str(tmp_path / "folder"), "--to", "safetensors")
    assert result.code == 0
    header, *lines = result.out.splitlines()
    assert header.split()[:5] == ["TENSORS", "COUNT", "FROM", "TO", "RELATION"]
    assert "every tensor is exact" in lines[-1]
    assert "converting folder: done" in result.err
    result = nybble_command("verify", str(tmp_path / "folder"))
    assert result.code == 0 and result.out.startswith("ok: 8 files, ")
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "tokenizer.json").unlink()
    (tmp_path / "folder" / "new.txt").write_text("")
    result = nybble_command("verify", str(tmp_path / "folder"))
    assert result.code == 1
    assert result.out.splitlines() == ["missing: tokenizer.json", "changed: config.json", "extra: new.txt"]
    found = json.loads(nybble_command("verify", str(tmp_path / "folder"), "--json").out)
    assert (found["ok"], found["missing"], found["files"]) == (False, ["tokenizer.json"], 8)


def test_gguf_is_told_by_the_name_of_the_output(nybble_command, source, tmp_path):
    result = nybble_command(
        "convert", str(source), str(tmp_path / "x.gguf"), "--quiet", "--json",
        "--encoding", "q5_0", "--tensor-encoding", "*.mlp.*=q8_0", "--tensor-encoding", "model.embed*=f16",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    kinds = {tensor["name"]: tensor["target"] for tensor in report["tensors"]}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "q8_0"
    assert kinds["model.embed_tokens.weight"] == "f16"
    assert kinds["lm_head.weight"] == "q5_0"
    assert report["relation"] == "lossy" and report["to"] == "gguf"
    assert nybble_command("verify", str(tmp_path / "x.gguf")).out.startswith("ok: 1 file, ")


def test_every_tensor_on_its_own(nybble_command, source, tmp_path):
    result = nybble_command(
        "convert", str(source), str(tmp_path / "x.gguf"), "--tensors", "--encoding", "q4_1"
    )
    assert sum(line.startswith("model.layers.") for line in result.out.splitlines()) == 18
    assert "tensors are lossy" in result.out


def test_what_would_be_lost_is_listed(nybble_command, tmp_path):
    source = model_file(tmp_path / "model.gguf", weights="q4_k")
    arguments = ("convert", str(source), str(tmp_path / "x"), "--to", "safetensors", "--quantization", "awq")
    result = nybble_command(*arguments)
    assert result.code == 1 and result.out == ""
    assert "no exact place" in result.err and "--allow-lossy" in result.err
    assert not (tmp_path / "x").exists()
    assert nybble_command(*arguments, "--allow-lossy").code == 0


def test_a_split_output(nybble_command, source, tmp_path):
    result = nybble_command(
        "convert", str(source), str(tmp_path / "x"), "--to", "gguf", "--split-size", "0.5M"
    )
    assert result.code == 0
    assert len(list((tmp_path / "x").glob("*.gguf"))) > 1


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--to", "gguf", "--tensor-encoding", "q8_0"),
        ("--to", "gguf", "--tensor-encoding", "=q8_0"),
        ("--to", "gguf", "--split-size", "many"),
        ("--to", "gguf", "--split-size", "0"),
    ],
)
def test_wrong_use(nybble_command, source, tmp_path, options):
    result = nybble_command("convert", str(source), str(tmp_path / "x"), *options)
    assert result.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_verify_without_a_manifest(nybble_command, source):
    result = nybble_command("verify", str(source))
    assert result.code == 1 and "has no manifest" in result.err


def test_adapters(nybble_command, source, tmp_path):
    from nybble.formats.huggingface.adapter import write_peft_adapter
    from support.adapters import random_adapter
    from support.conversions import WIDE

    folder = tmp_path / "pirate"
    folder.mkdir()
    write_peft_adapter(random_adapter(WIDE), folder)
    result = nybble_command("convert", str(source), str(tmp_path / "x.gguf"), "--adapter", f"{folder}:0.5")
    assert result.code == 1 and "quantized weights (q4_0)" in result.err
    result = nybble_command(
        "convert", str(source), str(tmp_path / "x.gguf"), "--json",
        "--adapter", f"{folder}:0.5", "--encoding", "f16",
    )  # fmt: skip
    assert result.code == 0
    how = {tensor["name"]: tensor["how"] for tensor in json.loads(result.out)["tensors"]}
    assert how["model.layers.0.mlp.up_proj.weight"].startswith("adapters merged")
    result = nybble_command("convert", str(folder), str(tmp_path / "a.gguf"))
    assert result.code == 1 and "--base" in result.err
    result = nybble_command("convert", str(folder), str(tmp_path / "a.gguf"), "--base", str(source))
    assert result.code == 0 and "every tensor is exact" in result.out
    result = nybble_command("convert", str(tmp_path / "a.gguf"), str(tmp_path / "b"), "--to", "safetensors",
                            "--base", str(source))  # fmt: skip
    assert result.code == 0 and (tmp_path / "b" / "adapter_config.json").is_file()
