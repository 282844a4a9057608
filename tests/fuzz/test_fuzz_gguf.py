"""The GGUF fuzzer, for a bounded number of cases, and that it would find the defects it looks for."""

from __future__ import annotations

import pytest
from fuzz_scripts import load

fuzz_gguf = load("fuzz_gguf")


@pytest.fixture(autouse=True)
def crashes(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_gguf.FUZZER, "crashes", tmp_path)
    return tmp_path


def test_no_crash_in_twenty_thousand_cases() -> None:
    counts = fuzz_gguf.FUZZER.fuzz(20_000, seed=1)
    assert counts["crashed"] == 0
    assert counts["accepted"] > 500 and counts["refused"] > 10_000


def test_memory_of_every_case_is_bounded() -> None:
    assert fuzz_gguf.FUZZER.fuzz(1_000, seed=2, measure_every=1)["crashed"] == 0


def test_the_same_seed_makes_the_same_cases() -> None:
    seeds = fuzz_gguf.load_seeds()
    first, again = ([fuzz_gguf.damage(fuzz_gguf.random.Random("7:3"), seeds)] for _ in range(2))
    assert first == again


def test_the_corpus_is_what_its_script_writes_and_all_of_it_is_accepted() -> None:
    files = load("make_corpus").files()
    stored = {path.stem: path.read_bytes() for path in fuzz_gguf.CORPUS.glob("*.gguf")}
    assert stored == files
    assert sum(map(len, stored.values())) < 100_000
    assert all(fuzz_gguf.look(data) for data in stored.values())


@pytest.mark.parametrize(
    "defect",
    [
        lambda: bytes(10_000_000) and False,  # memory out of proportion
        lambda: [][0],
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(RecursionError()),
    ],
)
def test_a_defect_of_the_reader_is_found_and_saved(defect, monkeypatch, crashes, capsys) -> None:
    right = fuzz_gguf.look
    monkeypatch.setattr(fuzz_gguf.FUZZER, "load_seeds", lambda: SEEDS)
    calls = iter(range(10**9))
    # The seeds themselves are looked at first; the defect is in the cases.
    monkeypatch.setattr(
        fuzz_gguf.FUZZER, "look", lambda data: right(data) if next(calls) < len(SEEDS) else defect()
    )
    assert fuzz_gguf.FUZZER.fuzz(3, seed=0, measure_every=1)["crashed"] == 3
    assert len(list(crashes.glob("gguf-0-*.gguf"))) == 3
    assert "gguf-0-2.gguf" in capsys.readouterr().err


SEEDS = fuzz_gguf.load_seeds()
