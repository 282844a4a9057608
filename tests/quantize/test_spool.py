"""Spool: what was written is found again, by the same job only, and damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.convert.errors import ValueErrors
from nybble.convert.made import MadeTensor
from nybble.errors import FormatError
from nybble.formats import output
from nybble.formats.output import OutputError
from nybble.quantize.spool import Spool

KINDS = ("q4_0", "f32", "int4_g32_f16_z", "q8_0")


def made(name: str, kind: str = "q4_0", rows: int = 3, seed: int = 0) -> MadeTensor:
    """A tensor of random bytes."""
    row = encoding(kind)
    data = np.random.default_rng(seed).integers(0, 256, row.nbytes(rows * 64), np.uint8)
    return MadeTensor(
        Tensor(name, (rows, 64), row, data), f"made {seed}", ValueErrors(rows * 64, 0.5, seed, 9.0)
    )


def unit(number: int) -> dict[str, MadeTensor]:
    return {f"t{number}.{kind}": made(f"t{number}.{kind}", kind, number + 1, number) for kind in KINDS}


def same(found: MadeTensor, expected: MadeTensor) -> bool:
    return (
        (found.tensor.name, found.tensor.shape, found.tensor.encoding)
        == (expected.tensor.name, expected.tensor.shape, expected.tensor.encoding)
        and np.array_equal(found.tensor.data, expected.tensor.data)
        and (found.how, found.errors) == (expected.how, expected.errors)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf.quantizing"


def filled(folder: Path) -> Spool:
    spool = Spool(folder, "job")
    spool.write(0, unit(0))
    spool.write(12, unit(12))
    return spool


def test_there_and_back(folder: Path) -> None:
    spool = Spool(folder, "job")
    assert not spool.resumed and spool.tensors() == {} and spool.unit(0) is None
    back = spool.write(0, unit(0))
    assert spool.unit(0) is back
    assert all(same(back[name], item) for name, item in unit(0).items())
    assert not any(item.tensor.is_view for item in back.values())  # they lie on the disk alone
    spool.write(12, unit(12))
    again = Spool(folder, "job")
    assert again.resumed and again.unit(1) is None
    expected = {**unit(0), **unit(12)}
    for found in (spool.tensors(), again.tensors()):
        assert list(found) == list(expected)
        assert all(same(found[name], item) for name, item in expected.items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000.bin", "0000.json", "0012.bin", "0012.json", "job.json",
    ]  # fmt: skip
    again.remove()
    assert not folder.exists()


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 5)), max_size=4), st.integers(0, 20_000))
def test_any_unit(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, int]], number: int
) -> None:
    folder = tmp_path_factory.mktemp("spool") / "x"
    items = {f"{i}": made(f"{i}", kind, rows, i) for i, (kind, rows) in enumerate(parts)}
    Spool(folder, "job").write(number, items)
    found = Spool(folder, "job").unit(number)
    assert found is not None and list(found) == list(items)
    assert all(same(found[name], item) for name, item in items.items())


def test_an_empty_unit_is_done(folder: Path) -> None:
    Spool(folder, "job").write(3, {})
    assert Spool(folder, "job").unit(3) == {}


def test_a_unit_whose_index_is_missing_was_not_finished(folder: Path) -> None:
    filled(folder)
    (folder / "0012.json").unlink()
    (folder / "0012.json.partial").write_text("{")
    again = Spool(folder, "job")
    assert again.resumed and again.unit(12) is None and again.unit(0) is not None
    assert all(same(item, unit(12)[name]) for name, item in again.write(12, unit(12)).items())


@pytest.mark.parametrize("job", ["other", None, "{", "[]", '{"fingerprint": 4}', '{"fingerprint": null}'])
def test_another_job_begins_anew(folder: Path, job: str | None) -> None:
    filled(folder).save_hidden(3, np.ones((2, 2), np.float32))
    (folder / "0013.bin.partial").write_bytes(b"")
    place = folder / "job.json"
    if job is None:
        place.unlink()
    elif job != "other":
        place.write_text(job)
    spool = Spool(folder, "other" if job == "other" else "job")
    assert not spool.resumed and spool.tensors() == {} and spool.hidden() is None
    assert [path.name for path in folder.iterdir()] == ["job.json"]


def test_what_no_quantization_wrote_is_not_removed(folder: Path) -> None:
    filled(folder)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match=r"has thesis\.tex, which no quantization wrote; move it away"):
        Spool(folder, "other")
    assert (folder / "thesis.tex").is_file() and (folder / "0000.bin").is_file()
    spool = Spool(folder, "job")  # of the same job: it is not in the way
    with pytest.raises(FormatError, match=r"thesis\.tex"):
        spool.remove()
    assert (folder / "thesis.tex").is_file()


def test_other_files_are_no_units(folder: Path) -> None:
    filled(folder)
    (folder / "0x.json").write_text("{}")
    assert len(Spool(folder, "job").tensors()) == 8


def test_a_file_in_the_place_of_the_folder(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(OutputError, match=r"x\.gguf\.quantizing cannot be made"):
        Spool(folder, "job")


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(folder, "job")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match=r"the disk has 0\.00 GB free"):
        spool.write(0, unit(0))
    with pytest.raises(OutputError, match=r"the disk has 0\.00 GB free"):
        spool.save_hidden(0, np.ones((5, 5), np.float32))
    assert [path.name for path in folder.iterdir()] == ["job.json"]


# -- damage --------------------------------------------------------------------------------------------


def changed(index: Path, **fields: object) -> None:
    """The first tensor of an index with other fields."""
    content = json.loads(index.read_bytes())
    content["tensors"][0] |= fields
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "fields",
    [
        {"encoding": "q9_9"},
        {"encoding": 4},
        {"shape": [3, 63]},
        {"shape": [10**6, 64]},
        {"shape": [-1, 64]},
        {"shape": "many"},
        {"shape": None},
        {"at": 10**9},
        {"at": -1},
        {"at": None},
        {"errors": {"elements": 1, "worst": 2}},
        {"errors": None},
    ],
)
def test_an_index_that_cannot_be_is_refused(folder: Path, fields: dict[str, object]) -> None:
    filled(folder)
    changed(folder / "0012.json", **fields)
    with pytest.raises(
        FormatError, match=r"0012\.json: is damaged \(.*\); remove .*quantizing to begin anew"
    ):
        Spool(folder, "job")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"nbytes": 0, "tensors": [1]}', "5", "null"])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    filled(folder)
    (folder / "0000.json").write_text(text)
    with pytest.raises(FormatError, match=r"0000\.json: is damaged"):
        Spool(folder, "job")


def test_bytes_that_are_missing_are_noticed(folder: Path) -> None:
    filled(folder)
    place = folder / "0000.bin"
    data = place.read_bytes()
    for wrong in (data[:-1], data + b"x", b""):
        place.write_bytes(wrong)
        with pytest.raises(FormatError, match=rf"0000\.bin has {len(wrong)} bytes, not {len(data)}"):
            Spool(folder, "job")
    place.unlink()
    with pytest.raises(FormatError, match=r"0000\.json: is damaged"):
        Spool(folder, "job")


# -- hidden states -------------------------------------------------------------------------------------


def test_hidden_states(folder: Path) -> None:
    spool = Spool(folder, "job")
    assert spool.hidden() is None
    hidden = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    spool.save_hidden(2, hidden * 2)
    spool.save_hidden(4, hidden)
    found = Spool(folder, "job").hidden()
    assert found is not None and found[0] == 4
    assert found[1].dtype == np.float32 and np.array_equal(found[1], hidden)
    assert Spool(folder, "other").hidden() is None


def broken(path: Path, **arrays: object) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "text", "npy", "pickle", "no layer", "layers", "double", "flat"]
)
def test_damaged_hidden_states_are_refused(folder: Path, damage: str) -> None:
    spool = Spool(folder, "job")
    hidden = np.ones((7, 5), np.float32)
    spool.save_hidden(2, hidden)
    path = folder / "hidden.npz"
    data = path.read_bytes()
    if damage in ("cut", "empty", "text"):
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, hidden)
    else:
        arrays: dict[str, dict[str, object]] = {
            "pickle": {"layer": 2, "hidden": np.array([{"a": 1}], object)},
            "no layer": {"hidden": hidden},
            "layers": {"layer": [1, 2], "hidden": hidden},
            "double": {"layer": 2, "hidden": hidden.astype(np.float64)},
            "flat": {"layer": 2, "hidden": hidden.reshape(-1)},
        }
        broken(path, **arrays[damage])
    with pytest.raises(FormatError, match=r"hidden\.npz: is damaged .* remove .*quantizing to begin anew"):
        spool.hidden()


def test_hidden_states_with_any_byte_changed(folder: Path) -> None:
    spool = Spool(folder, "job")
    hidden = np.ones((2, 3), np.float32)
    spool.save_hidden(2, hidden)
    path = folder / "hidden.npz"
    data = path.read_bytes()
    refused = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            found = spool.hidden()
        except FormatError:
            refused += 1
        else:  # a byte that says nothing, such as a date
            assert found is not None and found[0] == 2 and np.array_equal(found[1], hidden)
    assert refused > len(data) // 2
