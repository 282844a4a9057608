"""safetensors files, mapped: a single file, or the shards that an index names.

Nothing in a file is trusted (``header.py``), and an index can name files of its own folder only.
Tensors are views of the mapped bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.json_text import read_object
from nybble.formats.mapping import map_file
from nybble.formats.safetensors.header import DTYPE_BITS, ENCODINGS, TensorInfo, read_header

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_WHAT = "a safetensors file"

Buffer = bytes | mmap.mmap


class SafetensorsFile:
    """An open safetensors file, or all shards of an index.

    The files are mapped, not loaded, and stay mapped as long as a tensor of them is in use.
    """

    path: Path | None
    """The file or the index; None for a buffer."""
    paths: tuple[Path, ...]
    """Every file that is mapped."""
    metadata: Mapping[str, str]
    """What the file says about itself (``__metadata__``); of shards, the first one's."""
    infos: Mapping[str, TensorInfo]
    """Where each tensor lies in its file, also those whose dtype nybble cannot compute with."""
    tensors: Mapping[str, Tensor]
    """Tensors by name. Looking up one whose dtype has no encoding raises UnsupportedError."""

    def __init__(self, data: Buffer, source: str, path: Path | None = None) -> None:
        header = read_header(memoryview(data), len(data), source)
        self.path = path
        self.paths = () if path is None else (path,)
        self.metadata = header.metadata
        self.infos = header.tensors
        self.tensors = _Views(data, header.tensors, source)
        self._mapped = [data] if isinstance(data, mmap.mmap) else []

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "<memory>") -> SafetensorsFile:
        """Reads a file's content.

        Raises:
            FormatError: it is not a valid safetensors file.
            UnsupportedError: a tensor has a dtype that is not known.
        """
        return cls(data, source)

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Opens one file; errors as ``read_safetensors``."""
        data = map_file(path, _WHAT)
        try:
            return cls(data, str(path), path)
        except BaseException:
            _close(data)
            raise

    @classmethod
    def open_index(cls, path: Path) -> SafetensorsFile:
        """Opens all files that an index names; errors as ``read_safetensors``."""
        weight_map = _weight_map(path)
        shards: dict[str, SafetensorsFile] = {}
        try:
            for file in sorted(set(weight_map.values())):
                if not (path.parent / file).is_file():
                    raise NotFoundError(
                        f"{path.parent / file}: this part of the model is missing ({path.name} names it)"
                    )
                shards[file] = cls.open(path.parent / file)
            places = _places(path, weight_map, shards)
        except BaseException:
            for shard in shards.values():
                shard.close()
            raise
        joined = object.__new__(cls)
        joined.path = path
        joined.paths = tuple(path.parent / file for file in shards)
        joined.metadata = next(iter(shards.values())).metadata if shards else MappingProxyType({})
        joined.infos = MappingProxyType({name: shard.infos[name] for name, shard in places.items()})
        joined.tensors = _Joined({name: shard.tensors for name, shard in places.items()})
        joined._mapped = [data for shard in shards.values() for data in shard._mapped]
        return joined

    def close(self) -> None:
        """Unmaps the files. Views that are still in use keep their part of it mapped."""
        self.tensors = MappingProxyType({})
        mapped, self._mapped = self._mapped, []
        for data in mapped:
            _close(data)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SafetensorsFile {self.path or 'in memory'}: {len(self.infos)} tensors>"


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Opens a ``*.safetensors`` file, or the shards of a ``*.safetensors.index.json``.

    Raises:
        NotFoundError: the file, or one that the index names, does not exist.
        FormatError: a file is damaged, or index and files do not fit together.
        UnsupportedError: a tensor has a dtype that is not known.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return SafetensorsFile.open_index(path)
    return SafetensorsFile.open(path)


class _Views(Mapping[str, Tensor]):
    """The tensors of one file; each look-up makes a view."""

    def __init__(self, data: Buffer, infos: Mapping[str, TensorInfo], source: str) -> None:
        self._data = data
        self._infos = infos
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        info = self._infos[name]
        kind = ENCODINGS.get(info.dtype)
        if kind is None:
            raise UnsupportedError(
                f"{self._source}: tensor {name!r} is {info.dtype}; nybble computes with"
                f" {', '.join(ENCODINGS)}"
            )
        if info.offset % (DTYPE_BITS[info.dtype] // 8) == 0:
            return Tensor(name, info.shape, encoding(kind), self._view(info))
        # Kernels want elements at multiples of their size; nearly every file has them there.
        return Tensor(name, info.shape, encoding(kind), lambda: self._view(info).copy())

    def _view(self, info: TensorInfo) -> Bytes:
        if info.nbytes == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


class _Joined(Mapping[str, Tensor]):
    """The tensors of several files."""

    def __init__(self, places: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _weight_map(path: Path) -> dict[str, str]:
    """The index's ``weight_map``: file by tensor; every file is one of the index's own folder."""
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict):
        raise FormatError(f"{path}: weight_map is missing or no object")
    for name, file in found.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise FormatError(
                f"{path}: tensor {name[:200]!r} is said to be in {file!r:.200}; only the name of a"
                f" *{SUFFIX} file in the same folder is allowed"
            )
    return found


def _is_file_name(file: str) -> bool:
    safe = not any(letter in '/\\:*?"<>|' or letter < " " for letter in file)
    return safe and file.endswith(SUFFIX) and not file.startswith(".")


def _places(
    path: Path, weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsFile]
) -> dict[str, SafetensorsFile]:
    """The shard of each tensor: where the index says, and those that it forgot."""
    places: dict[str, SafetensorsFile] = {}
    for name, file in weight_map.items():
        if name not in shards[file].infos:
            raise FormatError(f"{path}: says that {file} holds tensor {name[:200]!r}, but it does not")
        places[name] = shards[file]
    for shard in shards.values():
        for name in shard.infos:
            places.setdefault(name, shard)
    return places


def _close(data: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # a view is alive: the mapping goes with the last one
        data.close()
