"""``nybble quantize`` on a small model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nybble.convert.verify import verify
from nybble.loading import read_checkpoint
from nybble.quantize.recipe import recipe_names
from support.quantizable_models import CONFIGS, calibration_text, quantizable_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return quantizable_model(tmp_path / "model.gguf", CONFIGS["llama"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return calibration_text(tmp_path / "text.txt")


def test_quantize(nybble_command, source, tmp_path):
    output = tmp_path / "x.gguf"
    result = nybble_command("quantize", str(source), str(output), "--recipe", "q8_0")
    assert result.code == 0
    header, *lines = result.out.splitlines()
    assert header.split()[:5] == ["TENSORS", "COUNT", "FROM", "TO", "RELATION"]
    assert "  16  f32   q8_0  lossy" in lines[0] and lines[0].endswith("quantized")
    assert lines[-1].startswith(f"{output}: ") and "16 of 21 tensors are lossy" in lines[-1]
    assert "quantizing: layer 1 of 2, 5%" in result.err
    assert verify(output).ok
    result = nybble_command("quantize", str(source), str(output))
    assert result.code == 1 and "x.gguf exists; name another output" in result.err
    result = nybble_command("quantize", str(source), str(output), "--overwrite", "--quiet", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["to"], report["relation"]) == ("gguf", "lossy")
    assert verify(output).manifest.recipe["recipe"] == "q4_k_m"
    kinds = {row["name"]: row["target"] for row in report["tensors"]}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "q5_0"  # rows of 128: in place of q4_k
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "x.gguf", "x.gguf.nybble.json"]


def test_a_method_that_calibrates(nybble_command, source, text, tmp_path):
    result = nybble_command(
        "quantize", str(source), str(tmp_path / "x"), "--recipe", "int4-awq", "--method", "awq+gptq",
        "--text", str(text), "--windows", "3", "--window", "50", "--seed", "7", "--precision", "f32",
        "--threads", "1", "--tensor-encoding", "*.o_proj.weight=keep", "--tensors",
    )  # fmt: skip
    assert result.code == 0
    lines = [line for line in result.out.splitlines() if line.startswith("model.layers.")]
    assert len(lines) == 18
    assert any("quantized: awq, gptq" in line for line in lines)
    tensors = read_checkpoint(tmp_path / "x").tensors
    assert tensors["model.layers.1.self_attn.o_proj.weight"].encoding.name == "f32"
    assert tensors["model.layers.1.mlp.up_proj.weight"].encoding.name == "int4_g64_f16_z"
    recipe = verify(tmp_path / "x").manifest.recipe
    assert (recipe["recipe"], recipe["method"]) == ("int4-awq", "awq+gptq")
    assert recipe["calibration"] == {
        "text": ["text.txt"], "windows": 3, "window": 50, "seed": 7, "precision": "f32",
    }  # fmt: skip


def test_an_importance_matrix_and_a_recipe_of_ones_own(nybble_command, source, text, tmp_path):
    importance, recipe = tmp_path / "imatrix.gguf", tmp_path / "mine.toml"
    result = nybble_command(
        "calibrate", str(source), str(importance), "--text", str(text), "--windows", "2", "--window", "50"
    )
    assert result.code == 0
    recipe.write_text('encoding = "q4_0"\n[[rules]]\ntensors = ["*"]\nimportance = true\nencoding = "q5_0"\n')
    command = ("quantize", str(source), str(tmp_path / "x.gguf"), "--recipe", str(recipe), "--json")
    report = json.loads(nybble_command(*command).out)
    assert {row["target"] for row in report["tensors"]} == {"q4_0", "f32"}
    report = json.loads(nybble_command(*command, "--overwrite", "--importance", str(importance)).out)
    assert {row["target"] for row in report["tensors"]} == {"q5_0", "f32"}
    assert {row["how"] for row in report["tensors"]} == {"kept", "quantized", "quantized, weighted"}


def test_targets(nybble_command, source, tmp_path):
    result = nybble_command(
        "quantize", str(source), str(tmp_path / "x"), "--recipe", "int4-rtn", "--quantization", "gptq"
    )
    assert result.code == 0
    config = json.loads((tmp_path / "x" / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "gptq"
    result = nybble_command(
        "quantize", str(source), str(tmp_path / "y"), "--to", "gguf", "--split-size", "100k"
    )
    assert result.code == 0 and len(list((tmp_path / "y").glob("*.gguf"))) > 1
    pytest.importorskip("onnx")
    result = nybble_command("quantize", str(source), str(tmp_path / "z"), "--recipe", "onnx-cpu-int4")
    assert result.code == 0 and (tmp_path / "z" / "model.onnx").is_file()


def test_the_list_of_recipes(nybble_command):
    result = nybble_command("quantize", "--list")
    assert result.code == 0
    header, *lines = result.out.splitlines()
    assert header.split() == ["RECIPE", "FOR", "METHOD", "WHAT"]
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 4 or line.split()[0] in ("f16", "f32", "bf16") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits-per-weight", "4.5", "--recipe", "q4_0"), "both say what tensors become: name one of them"),
        (("--bits-per-weight", "many"), "invalid float value"),
        (("--tensor-encoding", "q8_0"), "is not PATTERN=NAME"),
        (("--split-size", "0"), "is not a size such as 2G"),
        (("--windows", "0"), "0 is not above 0"),
        (("--threads", "-1"), "-1 is not above 0"),
        (("--precision", "half"), "invalid choice"),
    ],
)
def test_wrong_use(nybble_command, source, tmp_path, options, message):
    result = nybble_command("quantize", str(source), str(tmp_path / "x.gguf"), *options)
    assert result.code == 2 and message in result.err and result.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_model_and_output_are_needed(nybble_command, source):
    for arguments in ((), (str(source),)):
        result = nybble_command("quantize", *arguments)
        assert result.code == 2 and "MODEL and OUTPUT are needed" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "q4_x"), "unknown recipe 'q4_x'; known: "),
        (("--recipe", "none.toml"), "none.toml: no such recipe"),
        (("--method", "best"), "unknown method 'best'; known: rtn, awq, gptq, awq+gptq"),
        (("--to", "ggml"), "unknown target 'ggml'"),
        (("--tensor-encoding", "*.x=q8_0"), "no tensor's name matches '*.x'"),
        (("--method", "awq", "--text", "nothing.txt"), "nothing.txt: no such file or folder of texts"),
        (("--method", "awq", "--window", "5000"), "windows of 5000 tokens: the model takes 2 to 512"),
        (("--importance", "nothing.gguf"), "nothing.gguf"),
    ],
)
def test_what_cannot_be_done(nybble_command, source, tmp_path, options, message):
    result = nybble_command("quantize", str(source), str(tmp_path / "x.gguf"), *options)
    assert result.code == 1 and message in result.err and result.out == ""
    assert "a bug in nybble" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="a program cannot send Ctrl-C to another one there")
@pytest.mark.slow
def test_interrupted(source, text, tmp_path):
    output = tmp_path / "x.gguf"
    command = [
        sys.executable, "-m", "nybble", "quantize", str(source), str(output), "--recipe", "q4_0",
        "--method", "gptq", "--text", str(calibration_text(tmp_path / "long.txt", words=60_000)),
        "--precision", "f32", "--window", "512", "--windows", "150", "--threads", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "quantizing" in process.stderr.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert time.monotonic() - started < 10
    assert f"interrupted; the same command goes on from {output}.quantizing" in err
    assert not output.exists() and (tmp_path / "x.gguf.quantizing").is_dir()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert verify(output).ok and not (tmp_path / "x.gguf.quantizing").exists()
