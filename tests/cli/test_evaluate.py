"""``nybble evaluate`` on tiny models: table, JSON, report, limits, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nybble.convert.convert import convert
from support.conversions import model_file
from support.evaluations import random_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    source = model_file(root / "f32.gguf", weights="f32", embeddings="f32")
    convert(source, root / "q4_0.gguf", to="gguf", encoding="q4_0", allow_lossy=True)
    (root / "text.txt").write_text(random_text(100), encoding="utf-8")
    return root


@pytest.fixture
def arguments(folder):
    return ["evaluate", str(folder / "f32.gguf"), f"{folder / 'q4_0.gguf'},label=four", "--text",
            str(folder / "text.txt"), "--window", "32", "--windows", "3"]  # fmt: skip


def test_table(nybble_command, arguments):
    result = nybble_command(*arguments, "--repetitions", "1")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "45 tokens in 3 windows of 32, reference f32.gguf"
    assert lines[2].split()[:4] == ["MODEL", "PERPLEXITY", "KL", "DIVERGENCE"]
    assert lines[3].startswith("f32.gguf") and lines[4].startswith("four")
    assert " ± " in lines[4] and lines[4].endswith("MB")
    assert "flips of four" in result.out
    assert "loading f32.gguf\n" in result.err and "0 of 3 windows\n" in result.err


def test_json_and_html(nybble_command, arguments, tmp_path):
    report = tmp_path / "report.html"
    result = nybble_command(*arguments, "--no-speed", "--json", "--html", str(report), "--quiet")
    assert result.code == 0, result.err
    value = json.loads(result.out)
    assert [model["label"] for model in value["models"]] == ["f32.gguf", "four"]
    assert value["models"][1]["weight_errors"] and value["models"][1]["prefill"] is None
    assert "<svg" in report.read_text(encoding="utf-8")
    assert result.err == f"wrote {report}\n"


def test_fail_if(nybble_command, arguments):
    result = nybble_command(
        *arguments, "--no-speed", "--quiet", "--fail-if", "kld>100", "--fail-if", "size_ratio>.9"
    )
    assert (result.code, result.err) == (0, "")
    result = nybble_command(
        *arguments, "--no-speed", "--quiet", "--fail-if", "kld>1e-9", "--fail-if", "bits<5"
    )
    assert result.code == 1
    assert "MODEL" in result.out  # what was found is told all the same
    first, second = result.err.splitlines()
    assert "four: kld>1e-9: kld is 0." in first and "four: bits<5: bits is 4." in second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fail-if", "kld"], "is not MEASURE OPERATOR NUMBER"),
        (["--fail-if", "quality<1"], "no measure is called quality"),
        (["--fail-if", "decode<1", "--no-speed"], "asks for what --no-speed leaves out"),
        (["--window", "2"], "at least 4 tokens"),
        (["--stride", "32"], "between 1 and 31"),
        (["--flips", "-1"], "flips at least 0"),
        (["--html", "nowhere/at/all.html"], "there is no such folder"),
        (["extra,colour=red"], "is not OPTION=VALUE"),
    ],
)
def test_wrong_use(nybble_command, arguments, options, message):
    result = nybble_command(*arguments, *options)
    assert result.code == 2 and message in result.err, result.err


def test_a_limit_needs_a_second_model(nybble_command, folder):
    result = nybble_command(
        "evaluate", str(folder / "f32.gguf"), "--text", str(folder / "text.txt"), "--fail-if", "kld>1"
    )
    assert result.code == 2 and "beside the reference" in result.err


def test_no_text(nybble_command, arguments, folder):
    result = nybble_command("evaluate", str(folder / "f32.gguf"))
    assert result.code == 2 and "--text" in result.err
    result = nybble_command("evaluate", str(folder / "f32.gguf"), "--text", str(folder / "none.txt"))
    assert result.code == 1 and "none.txt" in result.err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c(folder):
    """Ctrl-C reaches the whole group of processes; all of them end, and no half result is printed."""
    (folder / "long.txt").write_text(random_text(60_000), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "nybble",
        "evaluate",
        str(folder / "f32.gguf"),
        str(folder / "q4_0.gguf"),
    ]
    process = subprocess.Popen(
        [*command, "--text", str(folder / "long.txt"), "--window", "32", "--no-speed"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    lines = []
    assert process.stderr is not None
    while not any(line.startswith("0 of") for line in lines):
        line = process.stderr.readline()
        assert line, "".join(lines)
        lines.append(line)
    time.sleep(0.3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
