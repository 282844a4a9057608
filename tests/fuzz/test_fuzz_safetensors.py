"""The safetensors fuzzer, for a bounded number of cases, and beside the format's own library."""

from __future__ import annotations

import random

import pytest
import safetensors
from fuzz_scripts import load

from nybble.errors import NybbleError
from nybble.formats.safetensors.reader import SafetensorsFile

fuzz_safetensors = load("fuzz_safetensors")
SEEDS = fuzz_safetensors.load_seeds()
STRICTER = (" twice", "the header starts with", "no list of whole numbers", "too many elements")
"""What the format's library lets pass: keys that are there twice, spaces before the header, and shapes whose
product is 0 only at the last factor."""


@pytest.fixture(autouse=True)
def crashes(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_safetensors.FUZZER, "crashes", tmp_path)
    return tmp_path


def test_no_crash_in_twenty_thousand_cases() -> None:
    counts = fuzz_safetensors.FUZZER.fuzz(20_000, seed=1)
    assert counts["crashed"] == 0
    assert counts["accepted"] > 500 and counts["refused"] > 10_000


def test_memory_of_every_case_is_bounded() -> None:
    assert fuzz_safetensors.FUZZER.fuzz(1_000, seed=2, measure_every=1)["crashed"] == 0


def test_what_is_accepted_is_what_the_formats_own_library_accepts() -> None:
    accepted = 0
    for case in range(10_000):
        data = fuzz_safetensors.damage(random.Random(f"3:{case}"), SEEDS)
        try:
            theirs = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            if "recursion limit" in str(error):  # nesting inside a key that nobody reads
                continue
            theirs = None
        try:
            ours = SafetensorsFile.from_bytes(data)
        except NybbleError as error:
            assert theirs is None or any(reason in str(error) for reason in STRICTER), (data, error)
            continue
        assert theirs is not None, data
        accepted += 1
        assert {name: (i.dtype, list(i.shape), i.nbytes) for name, i in ours.infos.items()} == {
            name: (item["dtype"], item["shape"], len(item["data"])) for name, item in theirs.items()
        }
    assert accepted > 500


def test_the_corpus_is_what_its_script_writes_and_all_of_it_is_accepted() -> None:
    files = load("make_safetensors_corpus").files()
    stored = {path.stem: path.read_bytes() for path in fuzz_safetensors.CORPUS.glob("*.safetensors")}
    assert stored == files
    assert all(fuzz_safetensors.look(data) for data in stored.values())


@pytest.mark.parametrize(
    "defect",
    [
        lambda: bytes(10_000_000) and False,  # memory out of proportion
        lambda: [][0],
        lambda: (_ for _ in ()).throw(RecursionError()),
    ],
)
def test_a_defect_of_the_reader_is_found_and_saved(defect, monkeypatch, crashes, capsys) -> None:
    right = fuzz_safetensors.look
    calls = iter(range(10**9))
    # The seeds themselves are looked at first; the defect is in the cases.
    monkeypatch.setattr(
        fuzz_safetensors.FUZZER, "look", lambda data: right(data) if next(calls) < len(SEEDS) else defect()
    )
    assert fuzz_safetensors.FUZZER.fuzz(3, seed=0, measure_every=1)["crashed"] == 3
    assert len(list(crashes.glob("safetensors-0-*.safetensors"))) == 3
    assert "safetensors-0-2.safetensors" in capsys.readouterr().err
