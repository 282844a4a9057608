"""One file over HTTP: breaks, resumes, checksums, redirects and errors, against a local server."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from nybble.errors import DownloadError, NotFoundError
from nybble.hub import download as module
from nybble.hub.download import Refused, download
from nybble.hub.progress import Transfer

from .conftest import Resource, Server, random_bytes

CONTENT = random_bytes(3 * 2**20 + 17)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "x.gguf"


def only(target: Path) -> None:
    """The target is there, whole, and nothing else is."""
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_plain(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)
    reports: list[Transfer] = []
    got = download(f"{server.url}/x", target, sha256=SHA256, size=len(CONTENT), progress=reports.append)
    only(target)
    assert (got.path, got.size, got.sha256) == ("x.gguf", len(CONTENT), SHA256)
    assert reports[0].done == 0 and not reports[0].finished
    assert reports[-1].done == reports[-1].total == len(CONTENT) and reports[-1].finished


def test_breaks_are_survived_and_resumed_from_where_they_were(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT, breaks=[1000, 2**20, 1])
    download(f"{server.url}/x", target)
    only(target)
    ranges = [request.headers.get("Range") for request in server.gets("/x")]
    assert ranges == [None, "bytes=1000-", f"bytes={1000 + 2**20}-", f"bytes={1001 + 2**20}-"]
    assert all(request.headers["If-Range"] == '"v1"' for request in server.gets("/x")[1:])


def break_off(server: Server, target: Path, **options: str) -> int:
    """A first process that gives up; returns how many bytes it left."""
    server.resources["/x"].breaks = [2**20 + 5, 0, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match="broke off 5 times"):
        download(f"{server.url}/x", target, **options)  # type: ignore[arg-type]
    server.resources["/x"].breaks = []
    server.requests.clear()
    assert not target.exists()
    return target.with_name("x.gguf.partial").stat().st_size


def test_a_later_process_goes_on(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)
    left = break_off(server, target)
    assert left == 2**20 + 5
    download(f"{server.url}/x", target)
    only(target)
    (request,) = server.gets("/x")
    assert request.headers["Range"] == f"bytes={left}-"


def test_a_file_that_changed_is_started_again(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(random_bytes(len(CONTENT), seed=1))
    break_off(server, target)
    server.resources["/x"] = Resource(CONTENT, etag='"v2"')
    download(f"{server.url}/x", target)
    only(target)


def test_without_validator_or_checksum_nothing_is_resumed(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(random_bytes(len(CONTENT), seed=1), etag='W/"weak"')
    break_off(server, target)
    server.resources["/x"] = Resource(CONTENT, etag=None)
    download(f"{server.url}/x", target)
    only(target)
    assert "Range" not in server.gets("/x")[0].headers


def test_a_checksum_lets_another_url_go_on(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT, etag=None)
    left = break_off(server, target, sha256=SHA256)
    server.resources["/moved"] = Resource(CONTENT, etag=None)
    download(f"{server.url}/moved", target, sha256=SHA256)
    only(target)
    assert server.gets("/moved")[0].headers["Range"] == f"bytes={left}-"


def test_a_server_without_ranges(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT, ranges=False, breaks=[2**20])
    download(f"{server.url}/x", target, sha256=SHA256)
    only(target)


def test_a_partial_that_is_already_whole(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)
    break_off(server, target, sha256=SHA256)
    target.with_name("x.gguf.partial").write_bytes(CONTENT)
    download(f"{server.url}/x", target, sha256=SHA256)  # the server answers 416 to an empty range
    only(target)


def test_wrong_checksum_is_deleted_and_both_are_named(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)
    with pytest.raises(DownloadError, match=f"(?s){SHA256}.*{'0' * 64}"):
        download(f"{server.url}/x", target, sha256="0" * 64)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_partial_is_found_by_the_checksum(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)
    break_off(server, target, sha256=SHA256)
    partial = target.with_name("x.gguf.partial")
    partial.write_bytes(b"\0" * partial.stat().st_size)
    with pytest.raises(DownloadError, match="sha256"):
        download(f"{server.url}/x", target, sha256=SHA256)
    assert list(target.parent.iterdir()) == []


def test_wrong_size(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)
    with pytest.raises(DownloadError, match="expected 5"):
        download(f"{server.url}/x", target, size=5)
    assert not target.exists()


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (401, Refused, "401"),
        (403, Refused, "403"),
        (404, NotFoundError, "no such file"),
        (410, NotFoundError, "no such file"),
        (400, DownloadError, "400"),
    ],
)
def test_refusals_are_not_retried(
    server: Server, target: Path, status: int, error: type[Exception], said: str
) -> None:
    server.resources["/x"] = Resource(status=status)
    with pytest.raises(error, match=said):
        download(f"{server.url}/x", target)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_and_given_up(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(status=503)
    with pytest.raises(DownloadError, match="broke off 5 times"):
        download(f"{server.url}/x", target)
    assert len(server.requests) == module.ATTEMPTS


def test_no_network(target: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot reach 127\.0\.0\.1.*network"):
        download("http://127.0.0.1:1/x", target)


def test_redirects_are_followed(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(status=302, location="/y", etag=None)
    server.resources["/y"] = Resource(CONTENT)
    download(f"{server.url}/x", target, headers={"Authorization": "Bearer t"})
    only(target)
    assert server.gets("/y")[0].headers["Authorization"] == "Bearer t"


def test_the_token_goes_to_no_other_server(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(status=307, location=f"{server.other_url}/y", etag=None)
    server.resources["/y"] = Resource(CONTENT)
    download(f"{server.url}/x", target, headers={"Authorization": "Bearer t"})
    only(target)
    assert server.gets("/x")[0].headers["Authorization"] == "Bearer t"
    assert "Authorization" not in server.gets("/y")[0].headers


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "FILE:/etc/passwd"]
)
def test_redirects_to_other_schemes_are_refused(server: Server, target: Path, location: str) -> None:
    server.resources["/x"] = Resource(status=302, location=location, etag=None)
    with pytest.raises(DownloadError, match="refused"):
        download(f"{server.url}/x", target)
    assert not target.exists()


def test_redirects_from_https_to_http_are_refused() -> None:
    import http.client
    import io
    import urllib.request

    request = urllib.request.Request("https://127.0.0.1/x")
    with pytest.raises(DownloadError, match="not safe"):
        module._Redirects().redirect_request(
            request, io.BytesIO(), 302, "Found", http.client.HTTPMessage(), "http://127.0.0.1/x"
        )


def test_no_space(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(target.parents[1])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    server.resources["/x"] = Resource(CONTENT)
    with pytest.raises(DownloadError, match="are free"):
        download(f"{server.url}/x", target)
    assert target.with_name("x.gguf.partial").stat().st_size == 0


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    class Full:
        def write(self, chunk: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DownloadError, match="disk is full"):
        module.write(Full(), b"x", tmp_path)  # type: ignore[arg-type]


def test_ctrl_c_leaves_a_partial_that_can_be_continued(server: Server, target: Path) -> None:
    server.resources["/x"] = Resource(CONTENT)

    def interrupt(transfer: Transfer) -> None:
        if transfer.done >= 2**20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.hub.progress._REPORT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            download(f"{server.url}/x", target, progress=interrupt)
    left = target.with_name("x.gguf.partial").stat().st_size
    assert 2**20 <= left < len(CONTENT)
    server.requests.clear()
    download(f"{server.url}/x", target)
    only(target)
    assert server.gets("/x")[0].headers["Range"] == f"bytes={left}-"
