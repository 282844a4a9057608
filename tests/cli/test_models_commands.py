"""``pull``, ``list`` and ``remove``, on a cache in a temporary folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nybble import hub
from nybble.hub import cache, reference
from nybble.hub.known import DEFAULT_MODEL, KNOWN_MODELS, find_known


@pytest.fixture
def cached_model():
    """SmolLM2 in the cache, as far as the cache can tell."""
    known = find_known("smollm2")
    place = reference.parse("smollm2").reference
    folder = cache.model_folder(place)
    folder.mkdir(parents=True)
    content = b"not really a model"
    (folder / "model.gguf").write_bytes(content)
    file = cache.CachedFile("model.gguf", len(content), hashlib.sha256(content).hexdigest())
    cache.write_manifest(folder, cache.Manifest(source=known.source, files=(file,)))
    return folder / "model.gguf"


def test_list_of_an_empty_cache(nybble_command):
    result = nybble_command("list")
    assert (result.code, result.out) == (0, "")
    assert "nybble list --known" in result.err
    assert json.loads(nybble_command("list", "--json").out) == []


def test_list(nybble_command, cached_model):
    result = nybble_command("list")
    header, row = result.out.splitlines()
    assert header.split() == ["NAME", "SIZE", "LAST", "USED", "FILE"]
    assert row.startswith("smollm2  18 B")
    assert row.endswith(str(cached_model))


def test_list_json(nybble_command, cached_model):
    (model,) = json.loads(nybble_command("list", "--json").out)
    assert model["name"] == "smollm2"
    assert model["size"] == 18
    assert Path(model["path"]) == cached_model
    assert model["sha256"]["model.gguf"] == hashlib.sha256(b"not really a model").hexdigest()


def test_known_models(nybble_command, cached_model):
    lines = nybble_command("list", "--known").out.splitlines()
    assert len(lines) == len(KNOWN_MODELS) + 1
    smollm2 = next(line for line in lines if line.startswith("smollm2 "))
    assert " yes " in smollm2
    values = json.loads(nybble_command("list", "--known", "--json").out)
    assert [value["name"] for value in values if value["default"]] == [DEFAULT_MODEL]
    assert [value["name"] for value in values if value["cached"]] == ["smollm2"]


def test_pull_prints_the_path(nybble_command, cached_model):
    result = nybble_command("pull", "smollm2")
    assert (result.code, result.out) == (0, f"{cached_model}\n")


def test_pull_reports_progress_on_standard_error(nybble_command, monkeypatch, tmp_path):
    def pull(name, progress=None):
        if progress is not None:
            progress(hub.Transfer(name, "downloading", 5, 10, finished=False))
        return tmp_path / name

    monkeypatch.setattr(hub, "pull", pull)
    result = nybble_command("pull", "a", "b")
    assert result.out == f"{tmp_path / 'a'}\n{tmp_path / 'b'}\n"
    assert "downloading a: 5 B of 10 B" in result.err
    assert nybble_command("pull", "a", "--quiet").err == ""


def test_pull_without_network_says_so(nybble_command):
    result = nybble_command("pull", "smollm2")
    assert result.code == 1
    assert "smollm2 is not in the cache" in result.err
    assert result.out == ""


def test_remove(nybble_command, cached_model):
    result = nybble_command("remove", "smollm2")
    assert (result.code, result.out) == (0, "")
    assert "removed smollm2: 18 B freed" in result.err
    assert not cached_model.exists()
    again = nybble_command("remove", "smollm2")
    assert again.code == 1
    assert "not in the cache" in again.err


def test_remove_leaves_the_users_own_files(nybble_command, tmp_path):
    own = tmp_path / "own.gguf"
    own.write_bytes(b"mine")
    assert nybble_command("remove", str(own)).code == 1
    assert own.exists()
