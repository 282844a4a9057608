"""Verify: whether an output is still what its manifest says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nybble.convert.manifest import (
    FILE_SUFFIX,
    FOLDER_NAME,
    FileHash,
    Manifest,
    hash_file,
    manifest_path,
    read_manifest,
)
from nybble.errors import NotFoundError


@dataclass(frozen=True)
class Verification:
    """What was found. Names are those in the manifest."""

    path: Path
    """The manifest."""
    manifest: Manifest
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    """Files of another size or another sha256."""
    extra: tuple[str, ...]
    """Files in the folder that the manifest does not know; of a file beside its manifest none."""

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not (self.missing or self.changed or self.extra)


def verify(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Compares an output with its manifest.

    Args:
        path: a folder with ``nybble.json``, a file with ``<file>.nybble.json`` beside it, or a manifest.
        progress: called with the bytes that were read, and all that will be.

    Raises:
        NotFoundError: there is no such output, or it has no manifest.
        FormatError: the manifest is broken.
    """
    given = Path(path)
    place = given if given.name == FOLDER_NAME or given.name.endswith(FILE_SUFFIX) else manifest_path(given)
    if not place.is_file():
        if not given.exists():
            raise NotFoundError(f"{given}: no such file or folder")
        raise NotFoundError(f"{given}: has no manifest ({place}); nybble convert writes one")
    manifest = read_manifest(place)
    folder = place.parent
    total = sum(item.nbytes for item in manifest.outputs)
    read = 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress(min(read, total), total)

    missing, changed = [], []
    for item in manifest.outputs:
        file = folder / item.name
        if not file.is_file():
            missing.append(item.name)
        elif file.stat().st_size != item.nbytes or hash_file(file, item.name, count) != item:
            changed.append(item.name)
    extra = extra_files(folder, manifest) if place.name == FOLDER_NAME else ()
    return Verification(place, manifest, tuple(missing), tuple(changed), extra)


def is_unchanged(files: tuple[FileHash, ...], manifest: Manifest) -> bool:
    """Whether hashes of files that were read are among those of the manifest's outputs."""
    return set(files) <= set(manifest.outputs)


def extra_files(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Files that are not in the manifest; hidden ones (``.cache``, ``.DS_Store``) do not count."""
    known = {item.name for item in manifest.outputs} | {FOLDER_NAME}
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple(
        name.as_posix()
        for name in found
        if name.as_posix() not in known and not any(part.startswith(".") for part in name.parts)
    )
