"""A quantization that ends in the middle goes on, and gives the bytes of one that does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.convert.verify import verify
from nybble.errors import FormatError
from nybble.quantize import job
from nybble.quantize.calibrate import LayerProgress
from nybble.quantize.layer_quantizer import LayerQuantizer
from nybble.quantize.layer_runner import LayerRunner
from nybble.quantize.quantize import CalibrationOptions, quantize
from nybble.quantize.recipe import METHODS
from support.quantizable_models import CONFIGS, calibration_text, quantizable_model

CONFIG = replace(CONFIGS["llama"], num_hidden_layers=4)


class Killed(Exception):
    """The end of a run, at a moment that the test chooses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    quantizable_model(folder / "llama.gguf", CONFIG)
    calibration_text(folder / "text.txt")
    return folder


@pytest.fixture
def model(folder: Path) -> Path:
    return folder / "llama.gguf"


@pytest.fixture
def options(folder: Path) -> CalibrationOptions:
    return CalibrationOptions(text=[folder / "text.txt"], windows=8, window=32)


def killing(when: Callable[[LayerProgress], bool]) -> Callable[[LayerProgress], None]:
    def progress(item: LayerProgress) -> None:
        if when(item):
            raise Killed

    return progress


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["hidden states kept", "not kept"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_where_another_was(
    method: str,
    seconds: float,
    model: Path,
    options: CalibrationOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "HIDDEN_SECONDS", seconds)
    whole, target = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    quantize(model, whole, "q4_0", method=method, calibration=options)
    state = tmp_path / "x.gguf.quantizing"
    for layer in (0, 2, 3):
        stop = killing(lambda item, layer=layer: item.layer == layer and item.fraction > (layer + 0.5) / 5)
        with pytest.raises(Killed):
            quantize(model, target, "q4_0", method=method, calibration=options, progress=stop)
        done = {int(path.stem) for path in state.glob("0*.json")}
        assert done == set(range(layer)) and not target.exists()
        assert (state / "hidden.npz").exists() == (seconds == 0.0 and layer > 0 and method != "rtn")
    rounded: list[int] = []
    original = LayerQuantizer.quantize

    def noted(self: LayerQuantizer, layer: int) -> object:
        rounded.append(layer)
        return original(self, layer)

    monkeypatch.setattr(LayerQuantizer, "quantize", noted)
    ran: list[int] = []
    advance = LayerRunner.advance

    def advanced(self: LayerRunner, layer: int) -> None:
        ran.append(layer)
        advance(self, layer)

    monkeypatch.setattr(LayerRunner, "advance", advanced)
    seen: list[LayerProgress] = []
    quantize(model, target, "q4_0", method=method, calibration=options, progress=seen.append)
    if method != "rtn":
        assert rounded == [3, 4]
        assert ran == ([3] if seconds == 0.0 else [0, 1, 2, 3])
    fractions = [item.fraction for item in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert target.read_bytes() == whole.read_bytes()
    assert verify(target).ok and not state.exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_that_ends_while_it_writes(
    method: str, model: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    whole, target = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    quantize(model, whole, "q4_0", method=method, calibration=options)

    def stop(*_: object) -> None:
        if (tmp_path / "x.gguf.partial").exists():
            raise Killed

    with pytest.raises(Killed):
        quantize(model, target, "q4_0", method=method, calibration=options, file_progress=stop)
    assert not target.exists()
    seen: list[LayerProgress] = []
    quantize(model, target, "q4_0", method=method, calibration=options, progress=seen.append)
    assert seen == []  # everything was rounded already
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"calibration": {"seed": 5}},
        {"calibration": {"precision": "f32"}},
        {"calibration": {"windows": 7}},
        {"method": "awq"},
        {"encodings": {"*.v_proj.weight": "q8_0"}},
        {"recipe": "q4_1"},
    ],
    ids=str,
)
def test_another_job_begins_anew(
    changed: dict[str, object], model: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    target = tmp_path / "x.gguf"
    stop = killing(lambda item: item.layer == 2)
    with pytest.raises(Killed):
        quantize(model, target, "q4_0", method="gptq", calibration=options, progress=stop)
    arguments = {"recipe": "q4_0", "method": "gptq", **changed}
    calibration = replace(options, **arguments.pop("calibration", {}))  # type: ignore[arg-type]
    seen: list[LayerProgress] = []
    quantize(model, target, calibration=calibration, progress=seen.append, **arguments)  # type: ignore[arg-type]
    assert seen[0].layer == 0
    quantize(model, tmp_path / "whole.gguf", calibration=calibration, **arguments)  # type: ignore[arg-type]
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_source_that_changed_begins_anew(folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "model.gguf", tmp_path / "x.gguf"
    source.write_bytes((folder / "llama.gguf").read_bytes())
    with pytest.raises(Killed):
        quantize(source, target, "q4_0", progress=killing(lambda item: item.layer == 2))
    quantizable_model(source, CONFIG, seed=1)
    quantize(source, target, "q4_0")
    quantize(source, tmp_path / "whole.gguf", "q4_0")
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_damage_is_said(model: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    with pytest.raises(Killed):
        quantize(model, target, "q4_0", progress=killing(lambda item: item.layer == 2))
    index = tmp_path / "x.gguf.quantizing" / "0000.json"
    index.write_text("{")
    with pytest.raises(FormatError, match=r"0000\.json: is damaged .* remove .*x\.gguf\.quantizing to begin"):
        quantize(model, target, "q4_0")


def test_hidden_states_of_another_size_are_refused(
    model: Path, options: CalibrationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "HIDDEN_SECONDS", 0.0)
    target = tmp_path / "x.gguf"
    stop = killing(lambda item: item.layer == 2)
    with pytest.raises(Killed):
        quantize(model, target, "q4_0", method="awq", calibration=options, progress=stop)
    path = tmp_path / "x.gguf.quantizing" / "hidden.npz"
    with path.open("wb") as file:
        np.savez(file, layer=np.array(2), hidden=np.zeros((3, 128), np.float32))
    with pytest.raises(FormatError, match=r"hidden\.npz: is damaged .* remove .*quantizing to begin anew"):
        quantize(model, target, "q4_0", method="awq", calibration=options)


SCRIPT = """
import sys
from nybble.quantize import job
from nybble.quantize import quantize as module
job.HIDDEN_SECONDS = 0.05
options = module.CalibrationOptions(text=[sys.argv[3]], windows=48, window=64)
module.quantize(sys.argv[1], sys.argv[2], "q4_0", method="awq+gptq", calibration=options, threads=1)
"""


@pytest.mark.slow
def test_killed_at_random_moments(folder: Path, tmp_path: Path) -> None:
    source = quantizable_model(tmp_path / "model.gguf", replace(CONFIG, num_hidden_layers=8))
    whole, target = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    program = [sys.executable, "-c", SCRIPT, str(source)]
    begun = time.perf_counter()
    subprocess.run([*program, str(whole), str(folder / "text.txt")], check=True, env=os.environ)
    seconds = time.perf_counter() - begun
    random, killed = np.random.default_rng(0), 0
    for _ in range(8):
        child = subprocess.Popen([*program, str(target), str(folder / "text.txt")], env=os.environ)
        time.sleep(random.uniform(0.3, 0.8) * seconds)
        child.kill()
        if child.wait(60) == 0:
            break
        killed += 1
    assert killed, "it was never killed in the middle"
    if not target.exists():
        subprocess.run([*program, str(target), str(folder / "text.txt")], check=True, env=os.environ)
    assert target.read_bytes() == whole.read_bytes() and verify(target).ok
    assert not (tmp_path / "x.gguf.quantizing").exists()
