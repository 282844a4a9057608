"""`hf:` names against a local server that speaks the hub's protocol."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import nybble.hub as models
from nybble.errors import DownloadError, NotFoundError
from nybble.hub.huggingface import choose

from .conftest import COMMIT, Resource, Server, random_bytes

CONTENT = random_bytes(2**20 + 3)


def test_a_file_by_name(hub: Server, cache: Path) -> None:
    hub.add_repository("o/r", {"x.Q4_0.gguf": CONTENT, "y.gguf": b"other"})
    path = models.resolve("hf:o/r/x.Q4_0.gguf")
    assert path.read_bytes() == CONTENT
    assert path == cache / "models" / "hf--o--r" / "x.Q4_0.gguf"
    manifest = json.loads(path.with_name("x.Q4_0.gguf.manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    assert manifest["files"][0]["size"] == len(CONTENT)


def test_the_second_time_asks_nobody(hub: Server) -> None:
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    first = models.resolve("hf:o/r")
    hub.requests.clear()
    assert models.resolve("hf:o/r") == models.resolve("hf:o/r/x.gguf") == first
    assert models.resolve("hf:o/r", offline=True) == first
    assert hub.requests == []
    assert models.pull("hf:o/r", update=True) == first
    assert hub.requests != []


def test_a_four_bit_file_is_chosen(hub: Server) -> None:
    files = {f"m-{e}.gguf": e.encode() for e in ("F16", "Q8_0", "Q4_K_M", "Q4_0", "IQ4_XS")}
    hub.add_repository("o/r", {"README.md": b"", "mmproj-m-f16.gguf": b"", **files})
    assert models.resolve("hf:o/r").read_bytes() == b"Q4_K_M"


def test_a_split_model_comes_whole(hub: Server) -> None:
    parts = {f"sub/m-Q4_K_M-0000{i}-of-00003.gguf": random_bytes(1000, i) for i in (1, 2, 3)}
    hub.add_repository("o/r", parts)
    path = models.resolve("hf:o/r")
    assert path.name == "m-Q4_K_M-00001-of-00003.gguf"
    assert {p.name for p in path.parent.glob("*.gguf")} == {Path(p).name for p in parts}
    (model,) = models.list_models()
    assert model.size == 3000


TEXT_FILES = ["config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
OTHERS = ["README.md", "onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "modeling_x.py"]


def test_safetensors_come_with_all_that_belongs_to_them(hub: Server) -> None:
    weights = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    wanted = [index, *weights, *TEXT_FILES]
    files = {
        name: random_bytes(500, i) for i, name in enumerate([*wanted, *OTHERS, "consolidated.safetensors"])
    }
    hub.add_repository("o/r", files)
    path = models.resolve("hf:o/r")
    assert path.name == index
    folder = path.parent
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop(f"{index}.manifest.json"))
    assert found == {name: files[name] for name in wanted}
    assert manifest["files"][0]["path"] == index
    hub.requests.clear()
    assert models.resolve("hf:o/r") == models.resolve(f"hf:o/r/{weights[1]}") == path
    models.remove("hf:o/r")
    assert not [p for p in folder.rglob("*") if p.is_file()]


def test_a_safetensors_file_by_name(hub: Server) -> None:
    files = {name: name.encode() for name in ("model.safetensors", "other.safetensors", "config.json")}
    hub.add_repository("o/r", files)
    path = models.resolve("hf:o/r/other.safetensors")
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "config.json",
        "other.safetensors",
        "other.safetensors.manifest.json",
    ]


def test_an_adapter(hub: Server) -> None:
    from nybble.adapters import read_adapters
    from nybble.formats.huggingface.adapter import CONFIG, WEIGHTS, write_peft_adapter
    from support.adapters import random_adapter
    from support.random_checkpoints import LLAMA

    written = random_adapter(LLAMA)
    with TemporaryDirectory() as folder:
        write_peft_adapter(written, Path(folder))
        files = {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    hub.add_repository("o/pirate", {"README.md": b"", **files})
    ((adapter, weight),) = read_adapters([("hf:o/pirate", 0.5)])
    assert (adapter.name, weight) == ("pirate", 0.5)
    assert adapter.pairs.keys() == written.pairs.keys()
    hub.requests.clear()
    ((adapter, weight),) = read_adapters({"hf:o/pirate": 2}, offline=True)
    assert (adapter.name, weight, hub.requests) == ("pirate", 2.0, [])
    with pytest.raises(DownloadError):
        read_adapters(["hf:o/other"], offline=True)


def test_a_break_is_resumed_behind_the_redirect(hub: Server) -> None:
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    hub.resources["/blobs/o/r/x.gguf"].breaks = [5000]
    assert models.resolve("hf:o/r/x.gguf").read_bytes() == CONTENT
    assert hub.gets("/blobs/o/r/x.gguf")[1].headers["Range"] == "bytes=5000-"


def test_the_hubs_checksum_is_checked(hub: Server) -> None:
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    hub.resources["/blobs/o/r/x.gguf"].content = CONTENT[:-1] + b"\0"
    with pytest.raises(DownloadError, match="sha256"):
        models.resolve("hf:o/r/x.gguf")
    assert models.list_models() == []


def test_the_token_is_sent_and_signatures_are_not_shown(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    models.resolve("hf:o/r/x.gguf")
    asked = [r for r in hub.requests if "/resolve/" in r.path]
    assert asked and all(
        {k.lower(): v for k, v in r.headers.items()}["authorization"] == "Bearer hf_secret" for r in asked
    )
    (fetched,) = hub.gets("/blobs/o/r/x.gguf")
    assert "authorization" not in {key.lower() for key in fetched.headers}
    hub.resources["/blobs/o/r/x.gguf"] = Resource(status=404)
    with pytest.raises(NotFoundError) as caught:
        models.pull("hf:o/r/x.gguf", update=True)
    assert "signature" not in str(caught.value) and "hf_secret" not in str(caught.value)


def test_a_gated_model_says_how_to_get_access(hub: Server) -> None:
    hub.add_repository("o/r", {"x.gguf": CONTENT}, gated=True)
    with pytest.raises(DownloadError, match=r"accept its terms.*HF_TOKEN"):
        models.resolve("hf:o/r/x.gguf")


def test_a_token_without_access_says_so(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add_repository("o/r", {"x.gguf": CONTENT}, gated=True)
    with pytest.raises(DownloadError, match="The token has no access"):
        models.resolve("hf:o/r/x.gguf")


def test_no_such_file_lists_what_there_is(hub: Server) -> None:
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    with pytest.raises(NotFoundError, match=r"no file 'y.gguf'; it has x\.gguf"):
        models.resolve("hf:o/r/y.gguf")


def test_no_such_repository_or_revision(hub: Server) -> None:
    with pytest.raises(NotFoundError, match="no such repository"):
        models.resolve("hf:o/none")
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    hub.resources["/o/r/resolve/v9/x.gguf"] = Resource(
        status=404, headers={"X-Error-Code": "RevisionNotFound"}
    )
    with pytest.raises(NotFoundError, match="no revision 'v9'"):
        models.resolve("hf:o/r/x.gguf@v9")


def test_a_hub_that_lists_hostile_names(hub: Server, cache: Path) -> None:
    from nybble.errors import NybbleError

    info = {"id": "o/r", "sha": COMMIT, "siblings": [{"rfilename": "../../../evil.gguf"}]}
    hub.resources["/api/models/o/r"] = Resource(json.dumps(info).encode(), etag=None)
    with pytest.raises(NybbleError):
        models.resolve("hf:o/r")
    assert not list(cache.parent.rglob("*evil*"))


def test_offline(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repository("o/r", {"x.gguf": CONTENT})
    for name in ("NYBBLE_OFFLINE", "HF_HUB_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with pytest.raises(DownloadError, match="not in the cache"):
                models.resolve("hf:o/r")
    assert hub.requests == []


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name in ("hf:o/r", "hf:o/r/x.gguf"):
        with pytest.raises(DownloadError, match=r"cannot reach http://127\.0\.0\.1:1.*network"):
            models.resolve(name)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["only.gguf", "README.md"], "only.gguf"),
        (
            ["Phi-3-mini-4k-instruct-fp16.gguf", "Phi-3-mini-4k-instruct-q4.gguf"],
            "Phi-3-mini-4k-instruct-q4.gguf",
        ),
        (["a.Q8_0.gguf", "a.Q6_K.gguf", "a.f32.gguf"], "a.Q6_K.gguf"),
        (
            ["Q4_0/m-00001-of-00002.gguf", "Q4_0/m-00002-of-00002.gguf", "m-f16.gguf"],
            "Q4_0/m-00001-of-00002.gguf",
        ),
        (["m-Q4_0.gguf", "m-Q4_0_4_4.gguf"], "m-Q4_0.gguf"),
        (["m.gguf", "m.imatrix.gguf", "mmproj-m.gguf"], "m.gguf"),
        (["config.json", "model.safetensors", "m.gguf"], "m.gguf"),
        (["config.json", "model.safetensors"], "model.safetensors"),
        (["config.json", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (
            ["adapter_config.json", "adapter_model.safetensors", "x/model.safetensors"],
            "adapter_model.safetensors",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"],
            "model.safetensors",
        ),
    ],
)
def test_choice(files: list[str], expected: str) -> None:
    assert choose(files, "hf:o/r") == expected


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["README.md"], "has no GGUF file and no model.safetensors"),
        (["model.safetensors"], r"has no GGUF file.*but not as a model with its config\.json"),
        (["config.json", "unet/model.safetensors"], r"has no GGUF file.*but not as a model"),
        (["a-F16.gguf", "a-F32.gguf"], "name one: hf:o/r/a-F16.gguf, hf:o/r/a-F32.gguf"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "name one"),
    ],
)
def test_no_clear_choice(files: list[str], said: str) -> None:
    with pytest.raises(NotFoundError, match=said):
        choose(files, "hf:o/r")
