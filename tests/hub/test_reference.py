"""What names mean, and that hostile ones are refused before they touch the disk or the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.errors import NotFoundError, NybbleError
from nybble.hub.known import KNOWN_MODELS, find_known
from nybble.hub.reference import (
    HubReference,
    LocalReference,
    PackageReference,
    UrlReference,
    check_file_name,
    parse,
    split_parts,
)


def test_every_known_model_parses_and_round_trips() -> None:
    names = [name for model in KNOWN_MODELS for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    for model in KNOWN_MODELS:
        named = parse(model.name)
        assert named.known is model
        assert named.reference.source == model.source
        assert model.license and model.description and model.size > 10**7


def test_the_names_that_the_contract_promises() -> None:
    for name in (
        "smollm2",
        "gemma3-270m",
        "phi3",
        "phi3-128k",
        "phi3.5",
        "phi4-mini",
        "SmolLM2",
        "qwen3-0.6b",
    ):
        assert find_known(name) is not None, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:owner/repo", HubReference("owner", "repo")),
        ("hf:owner/repo/file.gguf", HubReference("owner", "repo", "file.gguf")),
        ("hf:owner/repo/sub/file.gguf@v1.0", HubReference("owner", "repo", "sub/file.gguf", "v1.0")),
        ("hf:owner/repo@refs/pr/3", HubReference("owner", "repo", None, "refs/pr/3")),
        ("pypi:package", PackageReference((("package", None),))),
        ("pypi:package==1.0/data/x.gguf", PackageReference((("package", "1.0"),), "data/x.gguf")),
        ("pypi:a==1,b==2", PackageReference((("a", "1"), ("b", "2")))),
        ("https://host/a/x.gguf?b=1", UrlReference("https://host/a/x.gguf?b=1", "x.gguf")),
        (
            "http://host/x.gguf#sha256=" + "A" * 64,
            UrlReference("http://host/x.gguf", "x.gguf", "a" * 64),
        ),
    ],
)
def test_forms(name: str, expected: object) -> None:
    assert parse(name).reference == expected


def test_a_path_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert parse(str(file)).reference == LocalReference(file)


@pytest.mark.parametrize(
    "name",
    [
        "hf:owner",
        "hf:owner/",
        "hf:/repo",
        "hf:../repo",
        "hf:owner/..",
        "hf:own--er/repo",
        "hf:owner/repo/../../etc/passwd",
        "hf:owner/repo//x.gguf",
        "hf:owner/repo/a\\..\\b.gguf",
        "hf:owner/repo/.hidden/x.gguf",
        "hf:owner/repo/C:x.gguf",
        "hf:owner/repo/nul.gguf",
        "hf:owner/repo/x\x00.gguf",
        "hf:owner/repo@",
        "hf:owner/repo@../main",
        "pypi:",
        "pypi:-r requirements.txt",
        "pypi:--index-url=http",
        "pypi:package>=1",
        "pypi:git+https:",
        "pypi:package==1 --pre",
        "pypi:package/../x.gguf",
        "http://host/",
        "http://host/..",
        "http://host/%2e%2e",
        "http://host/..%2f..%2fx.gguf",
        "http://host/a%5c..%5cx.gguf",
        "http:///x.gguf",
        "http://user:password@host/x.gguf",
        "https://host/x.gguf#md5=1",
        "https://host/x.gguf#sha256=12",
        "http://[bad/x.gguf",
    ],
)
def test_malformed_and_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(NybbleError):
        parse(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "con.gguf", "LPT1", "x.", "x ", "a:b", "a" * 201]
)
def test_unsafe_file_names(name: str) -> None:
    with pytest.raises(NybbleError):
        check_file_name(name, "here")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2", "did you mean smollm2"),
        ("phi-3.5-mini", "did you mean"),
        ("someone/some-model-GGUF", "write hf:someone/some-model-GGUF"),
        ("ftp://host/x.gguf", "http: and https:"),
        ("./no/such/file.gguf", "nybble list --known"),
    ],
)
def test_an_unknown_name_says_what_to_do(name: str, said: str) -> None:
    with pytest.raises(NotFoundError, match=said.replace("(", r"\(")):
        parse(name)


def test_folders_are_safe_and_differ() -> None:
    names = ["hf:a/b", "hf:a/b@refs/pr/1", "hf:a/b@refs_pr_1", "pypi:a", "pypi:a==1", "pypi:a,b", "pypi:a,c"]
    names += ["http://h/x.gguf", "http://h/y/x.gguf", "http://h/x.gguf?q=1"]
    folders = [parse(name).reference.folder for name in names]  # type: ignore[union-attr]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert check_file_name(folder, folder) == folder


def test_split_names() -> None:
    assert split_parts("x.gguf") == ["x.gguf"]
    assert split_parts("x-00002-of-00002.gguf") == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    for bad in ("x-00003-of-00002.gguf", "x-00000-of-00002.gguf", "x-00001-of-99999.gguf"):
        with pytest.raises(NybbleError, match="makes no sense"):
            split_parts(bad)
