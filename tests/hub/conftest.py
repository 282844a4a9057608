"""A local server that speaks enough of HTTP and of the Hugging Face protocol to misbehave on purpose."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Resource:
    """What one path answers."""

    content: bytes = b""
    status: int = 200
    etag: str | None = '"v1"'
    ranges: bool = True
    location: str | None = None
    breaks: list[int] = field(default_factory=list)  # for each request: bytes sent before the line breaks
    headers: dict[str, str] = field(default_factory=dict)
    pause: tuple[int, threading.Event] | None = None  # after so many bytes, wait for the event


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.resources: dict[str, Resource] = {}
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def other_url(self) -> str:
        """The same server under another name, as a content delivery network would be."""
        return self.url.replace("127.0.0.1", "localhost")

    def gets(self, path: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path == path]

    def add_repository(
        self, repo: str, files: dict[str, bytes], *, token: str | None = None, gated: bool = False
    ) -> None:
        """A repository whose large files lie behind a redirect, as the real hub's do."""
        siblings = [{"rfilename": name} for name in files]
        info = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        api_headers = {"Content-Type": "application/json"}
        for path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
            self.resources[path] = Resource(info, headers=api_headers)
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            blob = f"/blobs/{repo}/{name}"
            self.resources[blob] = Resource(content, etag=f'"s3-{len(content)}"')
            for revision in ("main", COMMIT):
                self.resources[f"/{repo}/resolve/{revision}/{name}"] = Resource(
                    status=403 if gated else 302,
                    location=None if gated else f"{self.other_url}{blob}?signature=secret",
                    etag=None,
                    headers={
                        "X-Repo-Commit": COMMIT,
                        "X-Linked-Etag": f'"{sha256}"',
                        "X-Linked-Size": str(len(content)),
                        **({"X-Error-Code": "GatedRepo"} if gated else {}),
                    },
                )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(Request(self.command, path, dict(self.headers.items())))
        resource = self.server.resources.get(path)
        if resource is None:
            known_repo = any(
                path.startswith(f"/{key[len('/api/models/') :]}/") for key in self.server.resources
            )
            code = "EntryNotFound" if known_repo else "RepoNotFound"
            resource = Resource(
                status=404, etag=None, headers={"X-Error-Code": code, "X-Repo-Commit": COMMIT}
            )
        content, status, start = resource.content, resource.status, 0
        requested = self.headers.get("Range", "")
        condition = self.headers.get("If-Range")
        if status == 200 and resource.ranges and requested and condition in (None, resource.etag):
            start = int(requested[len("bytes=") : -1])
            status = 206 if start < len(content) else 416
        self.send_response(status)
        for name, value in resource.headers.items():
            self.send_header(name, value)
        if resource.etag:
            self.send_header("ETag", resource.etag)
        if resource.location:
            self.send_header("Location", resource.location)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        rest = b"" if status == 416 else content[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if not body:
            return
        if resource.pause is not None and resource.pause[0] < len(rest):
            count, event = resource.pause
            self.wfile.write(rest[:count])
            self.wfile.flush()
            event.wait(20)
            rest = rest[count:]
        if resource.breaks:
            self.wfile.write(rest[: resource.breaks.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(rest)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no settings of the user's, and no waiting between attempts."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NYBBLE_CACHE", str(folder))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "NYBBLE_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("nybble.hub.download.BACKOFF_SECONDS", 0.0)
    return folder


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as the Hugging Face endpoint."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


def random_bytes(count: int, seed: int = 0) -> bytes:
    """Bytes that no two offsets share, so that a wrong resume cannot go unseen."""
    import random

    return random.Random(seed).randbytes(count)
