"""``bits_per_weight`` on small models: sizes are kept, a mix beats one encoding, and a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.convert.verify import verify
from nybble.errors import UnsupportedError
from nybble.loading import read_checkpoint
from nybble.quantize import budget, sensitivity
from nybble.quantize.calibrate import LayerProgress
from nybble.quantize.importance import read_importance
from nybble.quantize.quantize import CalibrationOptions, quantize
from support.quantizable_models import CONFIGS, calibration_text, divergence, logits_of, quantizable_model


class Killed(Exception):
    """The end of a run, at a moment that the test chooses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3"):
        quantizable_model(folder / f"{name}.gguf", CONFIGS[name])
    calibration_text(folder / "text.txt")
    return folder


@pytest.fixture
def options(folder: Path) -> CalibrationOptions:
    return CalibrationOptions(text=[folder / "text.txt"], windows=8, window=32)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_mix_is_better_than_one_encoding_of_its_size(
    name: str, folder: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    model, expected = folder / f"{name}.gguf", logits_of(folder / f"{name}.gguf")
    fixed = quantize(model, tmp_path / "fixed.gguf", "q5_0")
    mixed = quantize(
        model, tmp_path / "mixed.gguf", bits_per_weight=fixed.bits_per_weight, calibration=options
    )
    assert fixed.bits_per_weight - 0.3 < mixed.bits_per_weight <= fixed.bits_per_weight
    assert len({tensor.target for tensor in mixed.tensors if len(tensor.shape) == 2}) > 1
    costs = [divergence(expected, logits_of(tmp_path / f"{kind}.gguf")) for kind in ("fixed", "mixed")]
    assert costs[1] < costs[0]
    assert verify(tmp_path / "mixed.gguf").ok
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".json")}
    assert left == {"fixed.gguf", "mixed.gguf"}


@pytest.mark.parametrize(
    ("to", "bits"), [("onnx-cpu-int4", 8.0), ("onnx-dml-int4", 9.0), ("safetensors", 12.0)]
)
def test_mixes_for_other_formats(
    to: str, bits: float, folder: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    target = tmp_path / "x"
    report = quantize(folder / "gemma3.gguf", target, to=to, bits_per_weight=bits, calibration=options)
    kinds = {tensor.target for tensor in report.tensors if tensor.target.startswith("int")}
    assert kinds and report.bits_per_weight <= bits + 0.1
    found = divergence(logits_of(folder / "gemma3.gguf"), logits_of(read_checkpoint(target)))
    assert found < 0.2


def test_given_encodings_stay(folder: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    quantize(
        folder / "llama.gguf",
        target,
        bits_per_weight=12.0,
        calibration=options,
        encodings={"*.v_proj.weight": "q8_0", "*.o_proj.weight": "keep"},
    )
    tensors = read_checkpoint(target).tensors
    for layer in range(2):
        assert tensors[f"model.layers.{layer}.self_attn.v_proj.weight"].encoding.name == "q8_0"
        assert tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].encoding.name == "f32"


def test_what_is_measured_survives_a_kill(
    folder: Path, options: CalibrationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole, target = folder / "llama.gguf", tmp_path / "whole.gguf", tmp_path / "x.gguf"
    quantize(model, whole, bits_per_weight=6.0, calibration=options, threads=2)
    monkeypatch.setattr(sensitivity, "_SAVE_SECONDS", -1.0)
    calls = []

    def stop(item: LayerProgress) -> None:
        if (tmp_path / "x.gguf.sensitivity").exists():
            raise Killed

    with pytest.raises(Killed):
        quantize(model, target, bits_per_weight=6.0, calibration=options, threads=2, progress=stop)
    assert not target.exists()
    kept = read_importance(tmp_path / "x.gguf.sensitivity.gguf", "llama")
    assert len(kept.entries) > 10

    def noted(*arguments: object, **more: object) -> object:
        calls.append(1)
        raise AssertionError("calibrated a second time")

    monkeypatch.setattr(budget, "Calibration", noted)
    quantize(model, target, bits_per_weight=6.0, calibration=options, threads=2)
    assert target.read_bytes() == whole.read_bytes() and not calls


def test_a_budget_that_is_too_small(folder: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"1 bits a weight: the smallest that gguf can hold .* is \d"):
        quantize(folder / "llama.gguf", tmp_path / "x.gguf", bits_per_weight=1.0, calibration=options)
