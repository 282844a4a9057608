"""``nybble calibrate`` on a small model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nybble.quantize.importance import read_importance
from support.conversions import model_file
from support.random_checkpoints import LLAMA


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_file(tmp_path / "model.gguf", LLAMA, weights="q8_0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("words " * 500, encoding="utf-8")
    return path


def test_calibrate(nybble_command, source, text, tmp_path):
    output = tmp_path / "imatrix.gguf"
    command = ["calibrate", str(source), str(output), "--text", str(text), "--windows", "3", "--window", "50"]
    result = nybble_command(*command)
    assert result.code == 0
    assert result.out.startswith(f"{output}: 22 linears, 3 windows of 50 tokens, ")
    assert "calibrating: layer 1 of 3, 33%" in result.err
    assert read_importance(output, "llama").chunk_count == 3
    result = nybble_command(*command)
    assert result.code == 1 and "exists; name another output" in result.err
    result = nybble_command(*command, "--overwrite", "--quiet", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["windows"], report["tokens"], report["datasets"]) == (3, 150, ["text.txt"])


def test_what_the_report_adds(nybble_command, source, text, tmp_path):
    result = nybble_command(
        "calibrate", str(source), str(tmp_path / "x.dat"), "--text", str(text), "--window", "60"
    )
    assert result.code == 0
    assert "windows of 60 tokens; 64 were asked for" in result.err


def test_wrong_use(nybble_command, source, tmp_path):
    result = nybble_command("calibrate", str(source), str(tmp_path / "x.gguf"), "--window", "0")
    assert result.code == 2 and "0 is not above 0" in result.err
    result = nybble_command("calibrate", str(source), str(tmp_path / "x.gguf"), "--window", "5000")
    assert result.code == 1 and "windows of 5000 tokens: the model takes 2 to 512 at a time" in result.err
    result = nybble_command("calibrate", str(source), str(tmp_path / "x.gguf"), "--text", "nothing.txt")
    assert result.code == 1 and "nothing.txt: no such file or folder of texts" in result.err


@pytest.mark.skipif(os.name == "nt", reason="a program cannot send Ctrl-C to another one there")
def test_interrupted(source, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("words and more of them\n" * 40_000, encoding="utf-8")
    output = tmp_path / "x.gguf"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "nybble", "calibrate", str(source), str(output), "--text", str(text),
            "--windows", "2000", "--precision", "f32",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "calibrating" in process.stderr.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert time.monotonic() - started < 5
    assert not output.exists()
