"""The ONNX fuzzer, for a bounded number of cases, and that it would find the defects it looks for."""

from __future__ import annotations

import pytest
from fuzz_scripts import load

pytest.importorskip("onnx")
fuzz_onnx = load("fuzz_onnx")


@pytest.fixture(autouse=True)
def crashes(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_onnx.FUZZER, "crashes", tmp_path)
    return tmp_path


def test_no_crash_in_six_hundred_cases() -> None:
    counts = fuzz_onnx.FUZZER.fuzz(600, seed=1)
    assert counts["crashed"] == 0
    assert counts["accepted"] > 10 and counts["refused"] > 400


@pytest.mark.slow
def test_no_crash_in_six_thousand_cases() -> None:
    assert fuzz_onnx.FUZZER.fuzz(6_000, seed=2)["crashed"] == 0


def test_the_same_seed_makes_the_same_cases() -> None:
    seeds = fuzz_onnx.load_seeds()
    first, again = (fuzz_onnx.damage(fuzz_onnx.random.Random("7:3"), seeds) for _ in range(2))
    assert first == again


def test_the_seeds_are_accepted() -> None:
    seeds = fuzz_onnx.load_seeds()
    assert len(seeds) > 8 and all(fuzz_onnx.look(data) for data in seeds)


@pytest.mark.parametrize("defect", [lambda: [][0], lambda: (_ for _ in ()).throw(MemoryError())])
def test_a_defect_of_the_reader_is_found_and_saved(defect, monkeypatch, crashes, capsys) -> None:
    right, calls = fuzz_onnx.look, iter(range(10**9))
    seeds = len(fuzz_onnx.load_seeds())
    # The seeds themselves are looked at first; the defect is in the cases.
    monkeypatch.setattr(
        fuzz_onnx.FUZZER, "look", lambda data: right(data) if next(calls) < seeds else defect()
    )
    assert fuzz_onnx.FUZZER.fuzz(3, seed=0)["crashed"] == 3
    assert len(list(crashes.glob("onnx-0-*.onnx"))) == 3
    assert "onnx-0-2.onnx" in capsys.readouterr().err
