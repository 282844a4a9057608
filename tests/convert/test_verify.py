"""Verify: every difference between an output and its manifest is found; broken manifests are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.convert.convert import convert
from nybble.convert.manifest import read_manifest
from nybble.convert.verify import verify
from nybble.errors import FormatError, NotFoundError
from support.conversions import model_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = model_file(folder / "model.gguf")
    convert(source, folder / "folder", to="safetensors")
    convert(source, folder / "copy.gguf", to="gguf")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made / "folder", tmp_path / "folder"))


def test_what_was_written_verifies(made: Path) -> None:
    for path in ("folder", "copy.gguf", "folder/nybble.json", "copy.gguf.nybble.json"):
        found = verify(made / path)
        assert found.ok and not (found.missing or found.changed or found.extra)
    names = {item.name for item in verify(made / "folder").manifest.outputs}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_one_changed_byte_is_found(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = verify(folder)
    assert (found.ok, found.changed, found.missing, found.extra) == (False, ("model.safetensors",), (), ())


def test_a_missing_a_shortened_and_a_new_file_are_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "more").mkdir()
    (folder / "more" / "x.txt").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    found = verify(folder)
    assert found.missing == ("config.json",)
    assert found.changed == ("tokenizer.json",)
    assert found.extra == ("more/x.txt",)


def test_progress_counts_every_byte(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(item.nbytes for item in verify(folder).manifest.outputs)
    assert seen[-1] == (total, total)


def test_where_there_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        verify(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"has no manifest .*nybble\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", ""])
def test_names_that_leave_the_folder_are_refused(name: str, folder: Path) -> None:
    content = json.loads((folder / "nybble.json").read_text())
    content["outputs"][0]["name"] = name
    (folder / "nybble.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="outside the folder"):
        verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"nybble_manifest": 2},
        {"nybble_manifest": None},
        {"outputs": {}},
        {"outputs": [{"name": "x"}]},
        {"inputs": ["x"]},
        {"tensors": []},
        {"carried": 3},
    ],
)
def test_broken_manifests_are_refused(change: dict[str, object], folder: Path) -> None:
    path = folder / "nybble.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=r"nybble\.json"):
        verify(folder)


def test_a_broken_record_of_blocks_is_refused(tmp_path: Path) -> None:
    """The manifest's numbers are checked against the file of blocks."""
    source = model_file(tmp_path / "model.gguf", weights="q6_k")
    convert(source, tmp_path / "folder", to="safetensors")
    blocks = tmp_path / "folder" / "nybble.blocks"
    blocks.write_bytes(blocks.read_bytes()[:100])
    report = convert(tmp_path / "folder", tmp_path / "back.gguf", to="gguf")
    assert {tensor.target for tensor in report.tensors} >= {"f32"}, "the records are of no use any more"
    path = tmp_path / "folder" / "nybble.json"
    content = json.loads(path.read_text())
    for entry in content["carried"]["gguf"]["blocks"].values():
        entry["pieces"] = [[-1, 1, 2**60]]
    path.write_text(json.dumps(content))
    report = convert(tmp_path / "folder", tmp_path / "again.gguf", to="gguf")
    # Quantizing the values anew may give blocks of the same values; that is right, and uses no record.
    assert not [tensor for tensor in report.tensors if "rebuilt" in tensor.how]
    assert {tensor.relation for tensor in report.tensors} == {"exact"}


def test_what_a_manifest_says(made: Path) -> None:
    manifest = read_manifest(made / "folder" / "nybble.json")
    assert [item.name for item in manifest.inputs] == ["model.gguf"]
    assert manifest.recipe == {"to": "safetensors"}
    entry = manifest.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert entry["source"] == "q4_0" and entry["target"] == "f32" and entry["relation"] == "exact"
    assert entry["how"] == "rows permuted, dequantized"
    keys = {row["key"] for row in manifest.carried["gguf"]["metadata"]}
    assert {"general.author", "other.number"} <= keys
    assert "tokenizer.ggml.tokens" in keys
    assert len((made / "folder" / "nybble.json").read_bytes()) < 40_000
