"""The ONNX fuzzer, for a bounded number of cases, and that it would find the defects it looks for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "fuzz" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fuzz_onnx = load("fuzz_onnx")


@pytest.fixture(autouse=True)
def crashes(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_onnx, "CRASHES", tmp_path)
    return tmp_path


def test_no_crash_in_six_hundred_cases() -> None:
    counts = fuzz_onnx.fuzz(600, seed=1)
    assert counts["crashed"] == 0
    assert counts["accepted"] > 10 and counts["refused"] > 400


@pytest.mark.slow
def test_no_crash_in_six_thousand_cases() -> None:
    assert fuzz_onnx.fuzz(6_000, seed=2)["crashed"] == 0


def test_the_same_seed_makes_the_same_cases() -> None:
    seeds = fuzz_onnx.load_seeds()
    first, again = (fuzz_onnx.damage(fuzz_onnx.random.Random("7:3"), seeds) for _ in range(2))
    assert first == again


def test_the_seeds_are_accepted() -> None:
    seeds = fuzz_onnx.load_seeds()
    assert len(seeds) > 8 and all(fuzz_onnx.look(data) for data in seeds)


@pytest.mark.parametrize("defect", [lambda: [][0], lambda: (_ for _ in ()).throw(MemoryError())])
def test_a_defect_of_the_reader_is_found_and_saved(defect, monkeypatch, crashes, capsys) -> None:
    monkeypatch.setattr(fuzz_onnx, "look", lambda data: defect())
    assert fuzz_onnx.fuzz(3, seed=0)["crashed"] == 3
    assert len(list(crashes.glob("onnx-0-*.onnx"))) == 3
    assert "onnx-0-2.onnx" in capsys.readouterr().err
