"""One file over HTTP: resumed after a break, checked, and put in place only when it is whole.

Beside the target `x` lies `x.partial` with the bytes so far and `x.partial.json` with what they are a part
of. They are continued only if the server still has that very file: by its checksum, or by its ETag or
modification time through If-Range (RFC 9110, sections 13.1.5 and 14). The caller holds the lock of the
folder.
"""

from __future__ import annotations

import email.message
import errno
import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import urlsplit

from nybble.errors import DownloadError, NotFoundError
from nybble.hub.cache import CachedFile, require_space
from nybble.hub.progress import Meter, ProgressCallback

CHUNK = 1 << 20
ATTEMPTS = 5  # in a row without a single new byte
BACKOFF_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
_MAX_WAIT_SECONDS = 30.0
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_AGENT = "nybble (https://pypi.org/project/nybble)"


class Refused(DownloadError):
    """The server wants a login or does not allow this (401, 403)."""


@dataclass(frozen=True)
class _Identity:
    """What the bytes of a partial file are a part of."""

    url: str
    sha256: str | None
    validator: str | None  # a strong ETag or a Last-Modified date

    def continues(self, earlier: _Identity | None) -> bool:
        if earlier is None:
            return False
        if self.sha256 is not None:
            return self.sha256 == earlier.sha256
        return self.url == earlier.url and earlier.sha256 is None and earlier.validator is not None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows http(s) to http(s), never down from https, and takes the token to no other server."""

    def redirect_request(  # noqa: PLR0917 (urllib's signature)
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise DownloadError(
                f"{_shown(req.full_url)} redirects to {_shown(newurl)}: refused, {new.scheme} is not safe"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> IO[bytes] | None:
        location = headers.get("Location") or headers.get("URI") or ""
        scheme = urlsplit(location).scheme
        if scheme and scheme.lower() not in ("http", "https"):
            raise DownloadError(
                f"{_shown(req.full_url)} redirects to {location!r}: refused, only http(s) is safe"
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> CachedFile:
    """Get `url` into `target`, continuing `target.partial` if it is a part of the same file.

    Args:
        url: http or https.
        target: where the whole file goes; its folder is made.
        size: bytes that the file must have, if known.
        sha256: checksum that it must have, in lower-case hexadecimal, if known.
        headers: sent with the request; Authorization goes to this server only.
        progress: told about every step.

    Returns:
        The file's name, size and checksum.

    Raises:
        NotFoundError: the server has no such file.
        Refused: a login is needed.
        DownloadError: no network, too many breaks, a full disk, or not the file that was expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    return _Download(
        url, target, size=size, sha256=sha256, headers=dict(headers or {}), progress=progress
    ).run()


class _Download:
    def __init__(
        self,
        url: str,
        target: Path,
        *,
        size: int | None,
        sha256: str | None,
        headers: dict[str, str],
        progress: ProgressCallback | None,
    ) -> None:
        self.url = url
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.state = target.with_name(target.name + ".partial.json")
        self.size = size
        self.identity = _Identity(url, sha256, None)
        self.headers = headers
        self.progress = progress
        self.digest = hashlib.sha256()
        self.done = 0
        self.reached = False  # the server has answered once
        self.opener = _opener()

    def run(self) -> CachedFile:
        self._take_up()
        with open(self.partial, "ab") as file:
            self._fill(file)
            file.flush()
            os.fsync(file.fileno())
        actual = self.digest.hexdigest()
        if self.identity.sha256 is not None and actual != self.identity.sha256:
            self._discard()
            raise DownloadError(
                f"{_shown(self.url)}: the file has sha256 {actual}, expected {self.identity.sha256}; "
                "what was downloaded is deleted, try again"
            )
        put_in_place(self.partial, self.target)
        self.state.unlink(missing_ok=True)
        return CachedFile(self.target.name, self.done, actual)

    def _take_up(self) -> None:
        """Keep the partial file if it is a part of what we want, and hash what is there."""
        earlier = _read_state(self.state)
        if not self.identity.continues(earlier) or not self.partial.exists():
            self._discard()
            return
        assert earlier is not None
        self.identity = _Identity(self.url, self.identity.sha256, earlier.validator)
        total = self.partial.stat().st_size
        if self.size is not None and total > self.size:
            self._discard()
            return
        meter = Meter(self.progress, self.target.name, action="checking", total=total)
        with open(self.partial, "rb") as file:
            while chunk := file.read(CHUNK):
                self.digest.update(chunk)
                self.done += len(chunk)
                meter.update(self.done)
        meter.finish()

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)
        self._start_again(None)

    def _start_again(self, file: BinaryIO | None) -> None:
        if file is not None:
            file.truncate(0)
        self.digest = hashlib.sha256()
        self.done = 0

    def _fill(self, file: BinaryIO) -> None:
        """Request and read until the file is whole, again after each break."""
        meter = Meter(self.progress, self.target.name, done=self.done, total=self.size)
        failures = 0
        while self.size is None or self.done < self.size:
            before = self.done
            wait = 0.0
            try:
                if self._receive(file, meter):
                    break
                problem: Exception = ConnectionError("the connection ended before the file did")
            except urllib.error.HTTPError as error:
                with error:
                    wait = self._judge(error, file)
                problem = error
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                _raise_if_hopeless(self.url, error, reached=self.reached)
                problem = error
            failures = 0 if self.done > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{_shown(self.url)}: broke off {failures} times ({problem}); "
                    f"{self.done:,} bytes are kept, the same command goes on from there"
                )
            time.sleep(max(wait, BACKOFF_SECONDS * 2**failures if failures else 0.0))
        meter.finish()

    def _receive(self, file: BinaryIO, meter: Meter) -> bool:
        """One request. True if the file is whole, False if it broke off."""
        headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **self.headers}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
            if self.identity.sha256 is None and self.identity.validator:
                headers["If-Range"] = self.identity.validator
        request = urllib.request.Request(self.url, headers=headers)
        with self.opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            total = self._accept(response, file)
            meter.total = total
            meter.update(self.done)
            if total is not None:
                require_space(self.target.parent, total - self.done)
            while chunk := response.read(CHUNK):
                if total is not None and self.done + len(chunk) > total:
                    self._discard_open(file)
                    raise DownloadError(
                        f"{_shown(self.url)}: the server sent more than the {total:,} bytes it said"
                    )
                write(file, chunk, self.partial)
                self.digest.update(chunk)
                self.done += len(chunk)
                meter.update(self.done)
        return total is None or self.done == total

    def _accept(self, response: http.client.HTTPResponse, file: BinaryIO) -> int | None:
        """Check the answer's head against what we have; return the whole file's size, if it says."""
        self.reached = True
        length = response.headers.get("Content-Length")
        total = int(length) if length is not None and length.isdigit() else None
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != self.done:
                self._start_again(file)
                raise ConnectionError("the server answered with a range that was not asked for")
            total = self.size if match[2] == "*" else int(match[2])
        elif self.done:  # 200: the file has changed, or the server knows no ranges
            self._start_again(file)
        if self.size is not None and total is not None and total != self.size:
            self._discard_open(file)
            raise DownloadError(f"{_shown(self.url)}: {total:,} bytes, expected {self.size:,}")
        self.identity = _Identity(self.url, self.identity.sha256, _validator(response.headers))
        content = {"url": self.url, "sha256": self.identity.sha256, "validator": self.identity.validator}
        self.state.write_text(json.dumps(content), encoding="utf-8")
        return total

    def _discard_open(self, file: BinaryIO) -> None:
        self._start_again(file)
        self.state.unlink(missing_ok=True)

    def _judge(self, error: urllib.error.HTTPError, file: BinaryIO) -> float:
        """Raise if another try is in vain; else return how many seconds the server wants us to wait."""
        if error.code == 416 and self.done:
            self._start_again(file)
            return 0.0
        if error.code in (401, 403):
            raise Refused(f"{_shown(self.url)}: the server refuses ({error.code} {error.reason})") from error
        if error.code in (404, 410):
            raise NotFoundError(f"{_shown(self.url)}: there is no such file ({error.code})") from error
        if error.code not in (408, 425, 429) and error.code < 500:
            raise DownloadError(f"{_shown(self.url)}: {error.code} {error.reason}") from error
        after = (error.headers.get("Retry-After") or "") if error.headers else ""
        return min(float(after), _MAX_WAIT_SECONDS) if after.isdigit() else 0.0


def write(file: BinaryIO, chunk: bytes, path: Path) -> None:
    """Write, with a full disk said in words."""
    try:
        file.write(chunk)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DownloadError(
                f"{path}: the disk is full; what is there is kept. Make room, or set NYBBLE_CACHE"
            ) from error
        raise DownloadError(f"{path}: cannot write: {error}") from error


def put_in_place(partial: Path, target: Path) -> None:
    """Give a whole, synced file its final name, so that a crash leaves the old state or the new one."""
    os.replace(partial, target)
    if os.name == "posix":
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems cannot sync a folder
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS with the system's proxies and certificates, and none of urllib's other schemes."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_ssl_context()),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _ssl_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and paths.capath is None and not context.get_ca_certs():
        # Python from python.org on macOS brings no certificates; huggingface_hub brings certifi.
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _raise_if_hopeless(url: str, error: Exception, *, reached: bool) -> None:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    host = urlsplit(url).hostname
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise DownloadError(
            f"{host}: its certificate is not trusted ({reason.verify_message}); "
            "behind a company proxy, set SSL_CERT_FILE to the proxy's certificates"
        ) from error
    if isinstance(error, urllib.error.URLError) and not reached:
        raise DownloadError(
            f"cannot reach {host}: {reason}. Is there a network? With a proxy, set HTTPS_PROXY; "
            "a model that is in the cache or on disk needs no network"
        ) from error


def _validator(headers: email.message.Message) -> str | None:
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return str(etag)
    modified = headers.get("Last-Modified")
    return str(modified) if modified else None


def _read_state(path: Path) -> _Identity | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _Identity(content["url"], content["sha256"], content["validator"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shown(url: str) -> str:
    """The URL without its query, which may hold a signature."""
    return urlsplit(url)._replace(query="", fragment="").geturl()
