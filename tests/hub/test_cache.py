"""The cache folder, listing, removing, local paths, URLs, and several processes at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nybble.hub as models
from nybble.errors import DownloadError, NotFoundError, NybbleError
from nybble.hub.lock import file_lock

from .conftest import Resource, Server, random_bytes

CONTENT = random_bytes(2 * 2**20 + 1)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PULL = "import sys, nybble.hub; print(nybble.hub.resolve(sys.argv[1]))"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NYBBLE_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_folder() == tmp_path / ".cache" / "nybble"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_folder() == tmp_path / "xdg" / "nybble"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert models.cache_folder() == tmp_path / "Library" / "Caches" / "nybble"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert models.cache_folder() == tmp_path / "local" / "nybble"


def test_url_list_and_remove(server: Server, cache: Path) -> None:
    server.resources["/a/x.gguf"] = Resource(CONTENT)
    server.resources["/a/y.gguf"] = Resource(b"GGUF")
    x, y = f"{server.url}/a/x.gguf", f"{server.url}/a/y.gguf"
    path = models.resolve(f"{x}#sha256={SHA256}")
    models.resolve(y)
    assert path.read_bytes() == CONTENT
    os.utime(path.with_name("x.gguf.manifest.json"), (1, 1))
    assert [m.source for m in models.list_models()] == [y, x]
    models.resolve(x)
    first = models.list_models()[0]
    assert (first.source, first.path, first.size) == (x, path, len(CONTENT))
    assert time.time() - first.last_used.timestamp() < 60
    assert models.remove(x) == len(CONTENT)
    assert not path.parent.exists()
    assert [m.source for m in models.list_models()] == [y]
    with pytest.raises(NotFoundError, match="not in the cache"):
        models.remove(x)
    assert models.remove(str(models.list_models()[0].path)) == 4


def test_a_split_url(server: Server) -> None:
    for i in (1, 2):
        server.resources[f"/m-0000{i}-of-00002.gguf"] = Resource(bytes([i]))
    path = models.resolve(f"{server.url}/m-00001-of-00002.gguf")
    assert [p.read_bytes() for p in sorted(path.parent.glob("*.gguf"))] == [b"\1", b"\2"]


def test_wrong_checksum_in_the_url(server: Server) -> None:
    server.resources["/x.gguf"] = Resource(CONTENT)
    with pytest.raises(DownloadError, match=SHA256):
        models.resolve(f"{server.url}/x.gguf#sha256={'1' * 64}")
    assert models.list_models() == []


def test_an_unfinished_download_can_be_removed(server: Server, cache: Path) -> None:
    server.resources["/x.gguf"] = Resource(CONTENT, breaks=[1000, *[0] * 9])
    with pytest.raises(DownloadError):
        models.resolve(f"{server.url}/x.gguf")
    assert models.list_models() == []
    assert models.remove(f"{server.url}/x.gguf") >= 1000
    assert not list((cache / "models").iterdir())


def test_a_file_that_was_cut_short_is_pulled_again(server: Server) -> None:
    server.resources["/x.gguf"] = Resource(CONTENT)
    path = models.resolve(f"{server.url}/x.gguf")
    path.write_bytes(CONTENT[:10])
    assert models.list_models() == []
    assert models.resolve(f"{server.url}/x.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 9}',
        '{"version": 1, "source": "x", "files": [], "requested": []}',
        '{"version": 1, "source": "u", "files": [{"path": "../x", "size": 1, "sha256": ""}]}',
    ],
)
def test_a_broken_manifest_is_no_model(cache: Path, text: str) -> None:
    folder = cache / "models" / "url--h--1"
    folder.mkdir(parents=True)
    (folder / "x.gguf.manifest.json").write_text(text)
    assert models.list_models() == []


def test_the_users_own_files_are_never_deleted(tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    with pytest.raises(NybbleError, match="nothing outside"):
        models.remove(str(own))
    assert own.exists()


def test_local_paths(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(NotFoundError, match="holds no model"):
        models.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    assert models.resolve(str(folder)) == folder
    (folder / "x.gguf").write_bytes(b"GGUF")
    (folder / "mmproj-x.gguf").write_bytes(b"GGUF")
    assert models.resolve(str(folder)) == models.resolve(str(folder / "x.gguf")) == folder / "x.gguf"
    (folder / "y.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotFoundError, match=r"several models.*x\.gguf, y\.gguf"):
        models.resolve(str(folder))


def test_local_split(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts[1:]:
        part.write_bytes(b"GGUF")
    with pytest.raises(NotFoundError, match=r"m-00001-of-00003\.gguf"):
        models.resolve(str(parts[1]))
    parts[0].write_bytes(b"GGUF")
    assert models.resolve(str(parts[2])) == models.resolve(str(tmp_path)) == parts[0]


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("NYBBLE_CACHE", str(file))
    with pytest.raises(DownloadError, match="set NYBBLE_CACHE"):
        models.resolve("http://127.0.0.1:1/x.gguf")


def start(url: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PULL, url], stdout=subprocess.PIPE, text=True)


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_processes_that_pull_at_once_share_one_download(server: Server) -> None:
    release = threading.Event()
    server.resources["/x.gguf"] = Resource(CONTENT, pause=(1000, release))
    url = f"{server.url}/x.gguf"
    processes = [start(url) for _ in range(3)]
    wait_for(lambda: server.gets("/x.gguf"))
    time.sleep(0.5)  # the others have started and wait for the lock
    release.set()
    outputs = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (path,) = outputs
    assert Path(path).read_bytes() == CONTENT
    assert len(server.gets("/x.gguf")) == 1


def test_a_killed_process_leaves_no_lock_and_a_partial_to_continue(server: Server, cache: Path) -> None:
    release = threading.Event()
    server.resources["/x.gguf"] = Resource(CONTENT, pause=(2**20 + 100, release))
    url = f"{server.url}/x.gguf"
    process = start(url)
    partial = cache / "models"
    wait_for(lambda: any(p.stat().st_size >= 2**20 for p in partial.rglob("*.partial")))
    process.kill()
    process.communicate()
    release.set()
    server.resources["/x.gguf"].pause = None
    server.requests.clear()
    assert models.resolve(url).read_bytes() == CONTENT
    (request,) = server.gets("/x.gguf")
    assert int(request.headers["Range"][len("bytes=") : -1]) >= 2**20


def test_lock_waits_and_gives_up(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "x.lock"
    waited = []
    with (
        file_lock(path),
        pytest.raises(DownloadError, match="still holds"),
        file_lock(path, on_wait=lambda: waited.append(1), timeout=0.3),
    ):
        pytest.fail("two holders of one lock")
    assert waited == [1]
    with file_lock(path, timeout=0):
        pass


def test_importing_the_hub_is_cheap() -> None:
    heavy = {"rich", "huggingface_hub", "urllib.request", "ssl"}
    code = f"import sys, nybble.hub; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
