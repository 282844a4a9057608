"""Files of a repository on Hugging Face, or on a server that speaks its protocol (`HF_ENDPOINT`).

`huggingface_hub` says which files there are, at which commit, how large, with which checksum and where to
get them, and knows the user's token; the bytes come through `nybble.hub.download` into nybble's own cache.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nybble.errors import DownloadError, NotFoundError, NybbleError
from nybble.hub.cache import CachedFile, Manifest
from nybble.hub.download import Refused, download
from nybble.hub.progress import ProgressCallback
from nybble.hub.reference import HubReference, check_relative_path, split_parts

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Encodings in the order in which one is chosen when the user names none: four bits first.
_PREFERRED = ("Q4_K_M", "Q4_0", "Q4_K_S", "Q4_K", "Q4_1", "Q4", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0")

_SAFETENSORS = (".safetensors", ".safetensors.index.json")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")
# What a Hugging Face folder has beside its weights, as far as nybble reads it.
_BESIDE = re.compile(
    r"(?:config|adapter_config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template"
    r"|quantize_config|quant_config)\.json|tokenizer\.model|chat_template\.jinja"
    r"|additional_chat_templates/[^/]+\.jinja"
)


@dataclass(frozen=True)
class _RemoteFile:
    url: str
    commit: str
    size: int | None
    sha256: str | None


def fetch(
    reference: HubReference, folder: Path, *, sha256: str | None, progress: ProgressCallback | None
) -> Manifest:
    """Get the model that `reference` names into `folder`.

    Args:
        reference: repository, and its file or None to choose one.
        folder: where the files go, under their paths in the repository.
        sha256: checksum of a single file, if known beforehand.
        progress: told about every step.

    Raises:
        NotFoundError: no such repository, revision or file, or several files to choose from.
        DownloadError: no network, no permission, or a damaged download.
    """
    hub = _Hub(reference)
    listed = None if reference.file else hub.list_files()
    first = reference.file or choose(listed or [], reference.source)
    if first.endswith(_SAFETENSORS):
        paths = safetensors_files(hub.list_files() if listed is None else listed, first)
    else:
        parent, slash, name = first.rpartition("/")
        paths = [f"{parent}{slash}{part}" for part in split_parts(name)]
    files: list[CachedFile] = []
    commit = None
    for path in paths:
        remote = hub.locate(path, revision=commit)
        commit = remote.commit
        target = folder / check_relative_path(path)
        try:
            got = download(
                remote.url,
                target,
                size=remote.size,
                sha256=(sha256 if len(paths) == 1 else None) or remote.sha256,
                headers=hub.headers(),
                progress=progress,
            )
        except Refused as error:
            raise DownloadError(hub.refusal(str(error))) from error
        files.append(CachedFile(path, got.size, got.sha256))
    sources = [
        HubReference(reference.owner, reference.repo, path, reference.revision).source
        for path in paths
        if path == paths[0] or path.endswith(_SAFETENSORS)  # any shard stands for the whole
    ]
    requested = tuple(name for name in dict.fromkeys([reference.source, *sources]) if name != sources[0])
    return Manifest(source=sources[0], files=tuple(files), requested=requested, revision=commit)


class _Hub:
    """One repository, asked through `huggingface_hub`, with its errors in nybble's words."""

    def __init__(self, reference: HubReference) -> None:
        import huggingface_hub

        self.reference = reference
        self.repo = f"{reference.owner}/{reference.repo}"
        # Read now and not when huggingface_hub was imported, so that a program can set it.
        self.endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
        self.token = huggingface_hub.get_token()

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def list_files(self) -> list[str]:
        """Every file of the repository."""
        from huggingface_hub import HfApi

        try:
            info = HfApi(endpoint=self.endpoint, token=self.token).model_info(
                self.repo, revision=self.reference.revision, timeout=30
            )
        except Exception as error:
            raise self._translate(error) from error
        return [file.rfilename for file in info.siblings or []]

    def locate(self, path: str, *, revision: str | None) -> _RemoteFile:
        """Commit, size and checksum of one file."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        wanted = revision or self.reference.revision
        url = hf_hub_url(self.repo, path, revision=wanted, endpoint=self.endpoint)
        try:
            found = get_hf_file_metadata(url, token=self.token or False, timeout=30)
        except Exception as error:
            raise self._translate(error, path) from error
        if not found.commit_hash:
            raise DownloadError(f"{self.endpoint} names no commit for {path}: is it a Hugging Face hub?")
        # The hub's ETag of a large file is its sha256 (of a small one, a git hash: no check).
        sha256 = found.etag if found.etag and _SHA256.fullmatch(found.etag) else None
        pinned = hf_hub_url(self.repo, path, revision=found.commit_hash, endpoint=self.endpoint)
        return _RemoteFile(pinned, found.commit_hash, found.size, sha256)

    def refusal(self, reason: str) -> str:
        page = f"{self.endpoint}/{self.repo}"
        if self.token:
            return f"{reason}. The token has no access to {self.repo}: ask for it on {page}"
        return (
            f"{reason}. {self.repo} is private, gated or does not exist. If {page} is there, accept its "
            "terms, then set HF_TOKEN to a token of yours (or run `hf auth login`)"
        )

    def _translate(self, error: Exception, path: str | None = None) -> NybbleError:
        """nybble's error for one of huggingface_hub's (or of the HTTP library below it)."""
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError) or (status in (401, 403)):
            return DownloadError(self.refusal(f"hf:{self.repo}: the hub refuses ({status})"))
        if isinstance(error, errors.RevisionNotFoundError):
            return NotFoundError(f"hf:{self.repo} has no revision {self.reference.revision!r}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return NotFoundError(f"hf:{self.repo}: {self.endpoint} has no such repository")
        if isinstance(error, errors.EntryNotFoundError):
            others = [name for name in self.list_files() if name.lower().endswith(".gguf")]
            return NotFoundError(
                f"hf:{self.repo} has no file {path!r}; it has " + (", ".join(others[:20]) or "no GGUF file")
            )
        if isinstance(error, errors.OfflineModeIsEnabled):
            return DownloadError("HF_HUB_OFFLINE is set: no download from Hugging Face")
        if isinstance(error, errors.HFValidationError):
            return NybbleError(f"hf:{self.repo}: {error}")
        if status is not None:
            return DownloadError(f"hf:{self.repo}: the hub answered {status}; try again later")
        return DownloadError(
            f"cannot reach {self.endpoint}: {error}. Is there a network? HF_ENDPOINT names another hub; "
            "a model that is in the cache or on disk needs no network"
        )


def choose(files: list[str], source: str) -> str:
    """The model to take from a repository when the user names no file: its GGUF file (of a split one, the
    first part), or its safetensors (of several, their index) where it has no GGUF file, or its LoRA adapter.

    Raises:
        NotFoundError: there is none, or the choice is not clear.
    """
    models = [name for name in files if name.lower().endswith(".gguf") and not _is_companion(name)]
    models = [name for name in models if _is_first(name)]
    if not models:
        for name in ("model.safetensors", "model.safetensors.index.json"):
            if name in files and "config.json" in files:
                return name
        if "adapter_model.safetensors" in files and "adapter_config.json" in files:
            return "adapter_model.safetensors"
        hint = " (it has safetensors, but not as a model with its config.json)"
        found = hint if any(name.endswith(".safetensors") for name in files) else ""
        raise NotFoundError(f"{source} has no GGUF file and no model.safetensors{found}")
    if len(models) == 1:
        return models[0]
    for encoding in _PREFERRED:
        label = re.compile(rf"(?:^|[-./_]){encoding}(?=[-./]|$)", re.IGNORECASE)
        matching = [name for name in models if label.search(name[: -len(".gguf")])]
        if len(matching) == 1:
            return matching[0]
        if matching:
            break
    raise NotFoundError(
        f"{source} has several GGUF files; name one: " + ", ".join(f"{source}/{name}" for name in models[:30])
    )


def safetensors_files(files: list[str], first: str) -> list[str]:
    """The files of a Hugging Face folder: ``first`` (weights or their index), its shards, what is beside."""
    parent, slash, name = first.rpartition("/")
    inside = [file[len(parent + slash) :] for file in files if file.startswith(parent + slash)]
    shard = _SHARD.fullmatch(name)
    stem = shard["stem"] if shard else name.removesuffix(_SAFETENSORS[1])
    index = f"{stem}{_SAFETENSORS[1]}"
    if shard and index in inside:
        name = index  # one shard alone is no model
    wanted = [name]
    if name == index:
        wanted += [file for file in inside if (match := _SHARD.fullmatch(file)) and match["stem"] == stem]
    wanted += [file for file in inside if _BESIDE.fullmatch(file)]
    return [f"{parent}{slash}{file}" for file in wanted]


def _is_companion(name: str) -> bool:
    """Image projectors and importance matrices are GGUF files, but no models."""
    base = name.rpartition("/")[2].lower()
    return "mmproj" in base or "imatrix" in base


def _is_first(name: str) -> bool:
    base = name.rpartition("/")[2]
    try:
        return split_parts(base)[0] == base
    except NybbleError:
        return False
