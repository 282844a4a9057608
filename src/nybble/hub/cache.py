"""The cache folder: where models lie, what is recorded about them, listing and removing.

    <cache>/models/<source>/<file>                  the model's file or files
    <cache>/models/<source>/<file>.manifest.json    source, sizes, checksums; its mtime is the last use
    <cache>/models/<source>/<file>.partial          a download that is not complete
    <cache>/locks/<source>.lock                     held while a source is downloaded or removed

A model is there when its manifest is: the manifest is written last and removed first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from nybble.errors import DownloadError, NotFoundError, NybbleError
from nybble.hub.known import known_by_source
from nybble.hub.lock import file_lock
from nybble.hub.reference import LocalReference, RemoteReference, check_relative_path, parse

_SUFFIX = ".manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class CachedFile:
    """One file of a model: its path in the model's folder (with `/`), bytes, and checksum."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is recorded beside a model.

    Attributes:
        source: the canonical name, the file included.
        files: the model's files; the first one is what a loader opens.
        requested: other spellings that led here, such as a repository without its file.
        revision: commit of a repository, or None.
        downloaded: when, in ISO 8601, UTC.
    """

    source: str
    files: tuple[CachedFile, ...]
    requested: tuple[str, ...] = ()
    revision: str | None = None
    downloaded: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class CachedModel:
    """One complete model in the cache.

    Attributes:
        name: the shortest name that loads it: the known name, or the source.
        source: where it came from.
        path: its first file.
        size: bytes of all its files.
        last_used: when it was last resolved, in local time.
        manifest: the record that all this was read from.
        manifest_path: where that record lies.
    """

    name: str
    source: str
    path: Path
    size: int
    last_used: datetime
    manifest: Manifest
    manifest_path: Path


def cache_folder() -> Path:
    """The folder that all of nybble's processes share: `NYBBLE_CACHE`, or the system's place for caches."""
    chosen = os.environ.get("NYBBLE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "nybble"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nybble"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg and os.path.isabs(xdg) else Path.home() / ".cache") / "nybble"


def model_folder(reference: RemoteReference) -> Path:
    """Where the files of `reference` go."""
    return cache_folder() / "models" / reference.folder


def lock_path(reference: RemoteReference) -> Path:
    """The lock of `reference`'s folder."""
    return cache_folder() / "locks" / f"{reference.folder}.lock"


def find(reference: RemoteReference) -> CachedModel | None:
    """The complete model that `reference` names, or None. A file of the wrong size does not count."""
    return next(_matching(reference), None)


def touch(model: CachedModel) -> None:
    """Record that the model was used now. A cache that cannot be written to is fine."""
    with suppress(OSError):
        os.utime(model.manifest_path)


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Record a complete model in `folder`, in one step."""
    name = manifest.files[0].path.replace("/", "__") + _SUFFIX
    path = folder / name
    partial = path.with_name(name + ".partial")
    content = {"version": _VERSION, **asdict(manifest)}
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def list_models() -> list[CachedModel]:
    """Every complete model in the cache, the last used first."""
    folder = cache_folder() / "models"
    models = [model for path in sorted(folder.glob(f"*/*{_SUFFIX}")) if (model := _read(path)) is not None]
    return sorted(models, key=lambda model: model.last_used, reverse=True)


def remove(name: str) -> int:
    """Delete a model, or what there is of its unfinished download, from the cache.

    Args:
        name: any name that `resolve` takes, or the path of a file in the cache.

    Returns:
        How many bytes were freed.

    Raises:
        NotFoundError: nothing of it is in the cache.
        NybbleError: it is the user's own file, or in use.
    """
    reference = parse(name).reference
    if isinstance(reference, LocalReference):
        path = reference.path.resolve()
        inside = [
            model for model in list_models() if path in (model.path.resolve(), model.path.parent.resolve())
        ]
        if not inside:
            raise NybbleError(
                f"{name} is not in the cache ({cache_folder()}); nybble deletes nothing outside it"
            )
        return remove(inside[0].source)
    folder = model_folder(reference)
    with file_lock(lock_path(reference), timeout=10):
        freed = sum(_delete(model) for model in list(_matching(reference)))
        if not list(folder.glob(f"*{_SUFFIX}")):
            freed += _delete_tree(folder)
    if not freed:
        raise NotFoundError(f"{name!r} is not in the cache; `nybble list` shows what is")
    return freed


def _matching(reference: RemoteReference) -> Iterator[CachedModel]:
    source = reference.source
    for path in sorted(model_folder(reference).glob(f"*{_SUFFIX}")):
        model = _read(path)
        if model is not None and (source == model.source or source in model.manifest.requested):
            yield model


def _read(path: Path) -> CachedModel | None:
    """The model that a manifest describes; None if its files are gone or the manifest is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            return None
        manifest = Manifest(
            source=str(content["source"]),
            files=tuple(
                CachedFile(str(check_relative_path(file["path"])), int(file["size"]), str(file["sha256"]))
                for file in content["files"]
            ),
            requested=tuple(content["requested"]),
            revision=content["revision"],
            downloaded=str(content["downloaded"]),
        )
        for file in manifest.files:
            if (path.parent / file.path).stat().st_size != file.size:
                return None
        last_used = datetime.fromtimestamp(path.stat().st_mtime)
        first = path.parent / manifest.files[0].path
    except (OSError, ValueError, KeyError, TypeError, IndexError, NybbleError):
        return None
    known = known_by_source(manifest.source)
    return CachedModel(
        name=known.name if known else manifest.source,
        source=manifest.source,
        path=first,
        size=sum(file.size for file in manifest.files),
        last_used=last_used,
        manifest=manifest,
        manifest_path=path,
    )


def _delete(model: CachedModel) -> int:
    model.manifest_path.unlink()
    for file in model.manifest.files:
        _unlink(model.manifest_path.parent / file.path)
    return model.size


def _delete_tree(folder: Path) -> int:
    freed = 0
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            freed += path.lstat().st_size
            _unlink(path)
        for name in folders:
            Path(root, name).rmdir()
    if folder.exists():
        folder.rmdir()
    return freed


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError as error:
        raise NybbleError(f"{path} cannot be deleted: is a process still using it? ({error})") from error


def require_space(folder: Path, needed: int) -> None:
    """Raise DownloadError unless `folder`'s disk has `needed` bytes and a little more."""
    import shutil

    free = shutil.disk_usage(folder).free
    if free < needed + 16 * 2**20:
        raise DownloadError(
            f"{folder}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free; "
            "make room (`nybble list`, `nybble remove NAME`) or set NYBBLE_CACHE to another disk"
        )
