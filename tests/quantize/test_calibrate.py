"""calibrate: the file it writes, and going on after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nybble.errors import Cancelled, FormatError, UnsupportedError
from nybble.formats.output import OutputError
from nybble.loading import read_checkpoint
from nybble.quantize.calibrate import (
    Calibration,
    LayerProgress,
    calibrate,
    calibration_windows,
    importance_of,
)
from nybble.quantize.importance import read_importance
from nybble.quantize.statistics import InputStatistics
from support.conversions import model_file
from support.linear_inputs import linear_inputs
from support.random_checkpoints import LLAMA, random_checkpoint, tokens, with_tensors

TEXT = "some words and more words in a line\n" * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_file(tmp_path / "model.gguf", LLAMA, weights="f32", embeddings="f32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_matrix_is_that_of_what_the_linears_read(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "imatrix.gguf"
    seen: list[LayerProgress] = []
    report = calibrate(
        model, output, text=[text], windows=5, window=64, precision="f32", progress=seen.append
    )
    assert (report.windows, report.window, report.tokens, report.linears) == (5, 64, 320, 22)
    assert (report.datasets, report.resumed_layer, report.notes) == (("text.txt",), 0, ())
    assert [progress.layer for progress in seen] == [0, 1, 2, 3]
    assert seen[-1].fraction == 1.0 and seen[-1].seconds_left is not None
    checkpoint = read_checkpoint(model)
    assert checkpoint.tokenizer is not None
    windows = calibration_windows(checkpoint, checkpoint.tokenizer.build(), text=[text], windows=5, window=64)
    found = read_importance(output, "llama")
    found.check(checkpoint)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (5, 64, ("text.txt",))
    for name, x in linear_inputs(checkpoint, [window.tolist() for window in windows]).items():
        assert found.entries[name].tokens == 320
        expected = (x**2).mean(0)
        assert np.abs(found.weights(name) - expected).max() < 2e-5 * expected.max(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imatrix.gguf", "model.gguf", "text.txt"]
    again = tmp_path / "again.gguf"
    calibrate(model, again, text=[text], windows=5, window=64, precision="f32", threads=1)
    assert again.read_bytes() == output.read_bytes()


def test_chats_go_through_the_template(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]}
    path.write_text(json.dumps(chat), encoding="utf-8")
    checkpoint = read_checkpoint(model)
    assert checkpoint.tokenizer is not None
    tokenizer = checkpoint.tokenizer.build()
    (window,) = calibration_windows(checkpoint, tokenizer, text=[path], windows=3, window=64)
    assert window.tolist() == tokenizer.encode("abcde")


def test_too_little_text_is_said(model: Path, text: Path, tmp_path: Path) -> None:
    report = calibrate(model, tmp_path / "x.dat", text=[text], windows=500, window=64)
    assert report.windows < 500
    assert report.notes == (f"the text has {report.windows} windows of 64 tokens; 500 were asked for",)
    assert read_importance(tmp_path / "x.dat", "llama").datasets == ("text.txt",)


def test_what_cannot_be_done_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="windows of 513 tokens: the model takes 2 to 512"):
        calibrate(model, tmp_path / "x.gguf", text=[text], window=513)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(OutputError, match="exists"):
        calibrate(model, tmp_path / "x.gguf", text=[text])


# -- going on after a kill -----------------------------------------------------------------------------


def windows() -> list[np.ndarray]:
    return [np.array(tokens(40, seed), np.int32) for seed in range(6)]


def make(model: Path, state: Path, **options: object) -> Calibration:
    return Calibration(read_checkpoint(model), windows(), state=state, state_seconds=0.0, **options)  # type: ignore[arg-type]


def test_a_calibration_goes_on_where_another_was(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "x.calibration"
    whole = Calibration(read_checkpoint(model), windows())
    assert list(whole.run()) == [0, 1, 2, 3]
    first = make(model, state)
    run = first.run()
    assert [next(run), next(run)] == [0, 1]
    run.close()
    assert state.is_file()
    seen: list[LayerProgress] = []
    second = make(model, state, progress=seen.append)
    assert list(second.run()) == [2, 3]
    assert second.resumed_layer == 2 and second.notes == []
    assert seen[0].layer == 2 and seen[0].fraction == 1.0
    assert set(second.statistics) == set(whole.statistics)
    for name, expected in whole.statistics.items():
        assert np.array_equal(second.statistics[name].sum_squares, expected.sum_squares), name
        assert np.array_equal(second.statistics[name].sum_absolute, expected.sum_absolute), name
    assert (
        second.statistics["model.layers.0.mlp.up_proj.weight"]
        is (second.statistics["model.layers.0.mlp.gate_proj.weight"])
    )
    second.remove_state()
    assert not state.exists()


def test_the_state_of_something_else_is_not_used(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "x.calibration"
    run = make(model, state).run()
    next(run)
    run.close()
    kept = state.read_bytes()
    other = make(model, state, precision="f32")
    assert next(other.run()) == 0
    assert "is of another model, text or precision: everything is done anew" in other.notes[0]
    state.write_bytes(kept)
    changed = Calibration(read_checkpoint(model), windows()[:5], state=state)
    assert next(changed.run()) == 0 and changed.notes
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert next(make(model, state).run()) == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_a_damaged_state_is_refused(model: Path, tmp_path: Path, damage: str) -> None:
    state = tmp_path / "x.calibration"
    run = make(model, state).run()
    next(run)
    run.close()
    data = state.read_bytes()
    if damage == "pickle":
        with state.open("wb") as file:
            np.savez(file, header=np.array([{"a": 1}], object))
    else:
        state.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(FormatError, match=r"is damaged .* remove it to begin anew"):
        next(make(model, state).run())


def test_cancelling(model: Path, tmp_path: Path) -> None:
    calibration = make(model, tmp_path / "x.calibration")
    calibration.cancel()
    with pytest.raises(Cancelled):
        list(calibration.run())


def test_permuted_columns_are_put_in_the_models_order() -> None:
    name = "model.layers.0.mlp.down_proj."
    checkpoint = random_checkpoint(LLAMA)
    order = np.random.default_rng(1).permutation(96).astype("<i4")
    permutation = checkpoint.tensors[f"{name}weight"].changed(shape=(96,), data=order.view(np.uint8))
    checkpoint = with_tensors(checkpoint, {f"{name}input_permutation": permutation})
    sums = np.arange(96.0)
    seen = InputStatistics(7, sums[order], np.zeros(96))
    found = importance_of(checkpoint, {f"{name}weight": seen})
    assert np.array_equal(found[f"{name}weight"].sum_squares, sums)
    assert found[f"{name}weight"].tokens == 7


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same_file(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(
        LLAMA, num_hidden_layers=12, hidden_size=256, intermediate_size=512, num_attention_heads=16
    )
    model = model_file(tmp_path / "model.gguf", config, weights="q8_0", embeddings="f32")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30, encoding="utf-8")
    program = (
        "import sys, nybble.quantize.calibrate as c\n"
        "c.Calibration.__init__.__kwdefaults__['state_seconds'] = float(sys.argv[3])\n"
        f"options = dict(text={str(text)!r}, windows=48, window=256, precision='f32')\n"
        "c.calibrate(sys.argv[1], sys.argv[2], **options)\n"
    )
    command = [sys.executable, "-c", program, str(model)]
    whole, output = tmp_path / "whole.gguf", tmp_path / "output.gguf"
    subprocess.run([*command, str(whole), "1e9"], check=True, env=os.environ)
    state = tmp_path / "output.gguf.calibration"
    process = subprocess.Popen([*command, str(output), "0"], env=os.environ)
    deadline = time.monotonic() + 120
    while not state.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert state.is_file() and not output.exists()
    subprocess.run([*command, str(output), "1e9"], check=True, env=os.environ)
    assert output.read_bytes() == whole.read_bytes()
    assert not state.exists()
