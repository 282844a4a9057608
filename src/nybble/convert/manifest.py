"""The manifest: what an output was made from and how, and the hashes of its files.

``nybble.json`` in a folder, ``<file>.nybble.json`` beside a file. It holds no times and no paths, so that
the same input gives the same bytes. What the output's format has no place for is kept in it
(``carried.py``), so that the way back restores it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import nybble
from nybble.convert.report import TensorReport
from nybble.errors import FormatError
from nybble.formats.json_text import parse_object

VERSION = 1
FOLDER_NAME = "nybble.json"
FILE_SUFFIX = ".nybble.json"
BLOCKS_NAME = "nybble.blocks"
"""What rebuilds the blocks of tensors that became plain numbers (``carried.py``)."""
MAX_BYTES = 256 << 20
_BLOCK = 1 << 22
_DIGITS = 6  # of errors: sums differ in the last digits between machines


@dataclass(frozen=True)
class FileHash:
    """One file: its name (in a folder: its path there, with ``/``), size and sha256."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    inputs: tuple[FileHash, ...]
    outputs: tuple[FileHash, ...]
    recipe: Mapping[str, Any]
    """The arguments that decide about the output."""
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By canonical name: encodings, relation, how, errors."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """See ``carried.py``."""
    version: str = nybble.__version__
    """Of nybble that wrote it."""

    def to_bytes(self) -> bytes:
        """The file's content: JSON; the same manifest gives the same bytes."""
        content = {
            "nybble_manifest": VERSION,
            "nybble": self.version,
            "recipe": dict(self.recipe),
            "inputs": [vars(item) for item in self.inputs],
            "outputs": [vars(item) for item in self.outputs],
            "tensors": {name: dict(values) for name, values in self.tensors.items()},
            "carried": dict(self.carried),
        }
        return json.dumps(content, indent=1, allow_nan=False).encode("ascii") + b"\n"


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output is: in a folder, or beside a file."""
    return output / FOLDER_NAME if output.is_dir() else output.with_name(output.name + FILE_SUFFIX)


def read_manifest(path: Path) -> Manifest:
    """A manifest file.

    Raises:
        FormatError: it is none, or of a newer version.
    """
    if path.stat().st_size > MAX_BYTES:
        raise FormatError(f"{path}: is too large for a manifest")
    content = parse_object(path.read_bytes(), str(path))
    if content.get("nybble_manifest") != VERSION:
        raise FormatError(
            f"{path}: nybble_manifest is {content.get('nybble_manifest')!r}; this nybble reads {VERSION}"
        )
    return Manifest(
        inputs=_files(content, "inputs", path),
        outputs=_files(content, "outputs", path),
        recipe=_mapping(content, "recipe", path),
        tensors=_mapping(content, "tensors", path),
        carried=_mapping(content, "carried", path),
        version=str(content.get("nybble")),
    )


def tensor_entries(reports: Iterable[TensorReport]) -> dict[str, dict[str, Any]]:
    """The manifest's part about tensors."""
    entries = {}
    for report in reports:
        entry: dict[str, Any] = {
            "shape": list(report.shape),
            "source": report.source,
            "target": report.target,
            "relation": report.relation,
            "how": report.how,
        }
        if report.relation != "exact":
            for name in ("max_error", "rms_error", "relative_error"):
                entry[name] = float(f"{getattr(report, name):.{_DIGITS - 1}e}")
        entries[report.name] = entry
    return entries


# -- hashes --------------------------------------------------------------------------------------------


def hash_file(path: Path, name: str | None = None, done: Callable[[int], None] | None = None) -> FileHash:
    """sha256 of a file, read in pieces; ``done`` gets the size of each."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            if done is not None:
                done(len(block))
    return FileHash(path.name if name is None else name, size, digest.hexdigest())


_INPUT_SUFFIXES = (
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".onnx",
    ".data",
    ".onnx_data",
    BLOCKS_NAME,
)


def input_files(source: Path, metadata: Mapping[str, object]) -> list[Path]:
    """The files of a model: a GGUF file and its other parts, or those of a folder that matter."""
    if source.suffix == ".gguf":
        from nybble.formats.gguf.split import part_paths

        return part_paths(source, metadata)
    folder = source if source.is_dir() else source.parent
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name.endswith(_INPUT_SUFFIXES) and path.name != FOLDER_NAME
    )


# -- checks --------------------------------------------------------------------------------------------


def _files(content: Mapping[str, Any], key: str, path: Path) -> tuple[FileHash, ...]:
    rows = content.get(key)
    if not isinstance(rows, list):
        raise FormatError(f"{path}: {key} must be a list of files")
    files = []
    for row in rows:
        if not (
            isinstance(row, dict)
            and isinstance(row.get("name"), str)
            and isinstance(row.get("nbytes"), int)
            and isinstance(row.get("sha256"), str)
        ):
            raise FormatError(f"{path}: {key} must be files with name, nbytes and sha256")
        if not is_inside(row["name"]):
            raise FormatError(f"{path}: {row['name'][:100]!r} in {key} points outside the folder")
        files.append(FileHash(row["name"], row["nbytes"], row["sha256"]))
    return tuple(files)


def is_inside(name: str) -> bool:
    """Whether a name stays in its folder on every system."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:\0")


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = content.get(key, {})
    if not isinstance(found, dict):
        raise FormatError(f"{path}: {key} must be an object")
    return found


def relative_names(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Paths below a folder as names in a manifest."""
    return [path.relative_to(folder).as_posix() for path in paths]
