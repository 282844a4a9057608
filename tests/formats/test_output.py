"""Outputs appear complete or not at all."""

from __future__ import annotations

import os

import pytest

from nybble.formats.output import OutputError, require_space, staged_file, staged_folder


def test_a_file_appears_at_the_end(tmp_path):
    target = tmp_path / "new" / "model.bin"
    with staged_file(target) as partial:
        partial.write_bytes(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc"
    assert os.listdir(target.parent) == ["model.bin"]


def test_a_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "model"
    with staged_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a.bin").write_bytes(b"abc")
        assert not target.exists()
    assert (target / "inner" / "a.bin").read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("staged", [staged_file, staged_folder])
def test_failure_leaves_nothing(tmp_path, staged):
    with pytest.raises(RuntimeError, match="half way"), staged(tmp_path / "model") as partial:
        if staged is staged_file:
            partial.write_bytes(b"abc")
        raise RuntimeError("half way")
    assert os.listdir(tmp_path) == []


def test_errors_of_the_system_are_told(tmp_path):
    with (
        pytest.raises(OutputError, match=r"model was not written: .*No space left"),
        staged_file(tmp_path / "model"),
    ):
        raise OSError(28, "No space left on device")


def test_an_existing_output_stays(tmp_path):
    target = tmp_path / "model"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists; name another"), staged_file(target):
        pass
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("fails", [False, True])
def test_overwriting_replaces_the_whole_folder(tmp_path, fails):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    try:
        with staged_folder(target, overwrite=True) as partial:
            (partial / "new").write_bytes(b"new")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert os.listdir(target) == ["old" if fails else "new"]
    assert os.listdir(tmp_path) == ["model"]


def test_the_rest_of_a_killed_run_is_replaced(tmp_path):
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    with staged_folder(tmp_path / "model") as partial:
        assert partial == left
        assert os.listdir(partial) == []
    assert os.listdir(tmp_path) == ["model"]


def test_space(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"takes 1000000000\.00 GB, but the disk has"):
        require_space(tmp_path / "not" / "yet", 10**18)
