"""Writing safetensors: one file, or shards with an index; never more than one tensor in memory.

The same tensors give the same bytes: elements are aligned because larger dtypes come first, names
are sorted within a dtype, and the header is padded so that the data start at a multiple of 64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nybble.checkpoint.tensor import Tensor
from nybble.formats.json_text import write_object
from nybble.formats.mapping import release_pages
from nybble.formats.output import Progress, WriteCounter
from nybble.formats.safetensors.header import DTYPE_BITS, ENCODINGS, MAX_HEADER, METADATA
from nybble.formats.safetensors.reader import INDEX_SUFFIX, SUFFIX

DTYPES: Mapping[str, str] = {name: dtype for dtype, name in ENCODINGS.items()}
"""The dtype of each encoding that the format can hold."""
ALIGNMENT = 64
SHARD_BYTES = 5_000_000_000
_PIECE = 64 << 20  # bytes written at a time
_RELEASE = 256 << 20  # bytes after which the sources' pages are given back


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes one file.

    Args:
        tensors: by the name that they get; their data are asked for one after another.
        path: the file; one that exists is replaced.
        metadata: the file's ``__metadata__``.
        progress: see ``Progress``.

    Raises:
        ValueError: a tensor's encoding is none of safetensors' dtypes.
        OSError: the file cannot be written.
    """
    check_dtypes(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write(tensors, path, metadata or {}, _Counter(total, progress))


def write_shards(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    shard_bytes: float = SHARD_BYTES,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes ``model.safetensors``, or shards of at most ``shard_bytes`` and their index.

    Tensors go to the shards in the mapping's order; one that is larger than ``shard_bytes`` has a
    shard of its own. Returns the files written. Other arguments and errors as ``write_safetensors``.
    """
    check_dtypes(tensors)
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    counter = _Counter(total, progress)
    if len(shards) == 1:
        path = folder / f"{stem}{SUFFIX}"
        _write(tensors, path, metadata or {}, counter)
        return [path]
    paths = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}{SUFFIX}"
        _write({name: tensors[name] for name in names}, path, metadata or {}, counter)
        weight_map |= dict.fromkeys(names, path.name)
        paths.append(path)
    index = folder / f"{stem}{INDEX_SUFFIX}"
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_object(index, content)
    return [*paths, index]


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the tensor, where one cannot be written as it is."""
    for name, tensor in tensors.items():
        if tensor.encoding.name not in DTYPES:
            raise ValueError(
                f"{name}: safetensors has no dtype for {tensor.encoding.name};"
                f" choose one of {', '.join(DTYPES)} for it"
            )


class _Counter(WriteCounter):
    """Gives the sources' pages back from time to time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        super().__init__(total, progress)
        self._held = 0

    def add(self, nbytes: int) -> None:
        self._held += nbytes
        if self._held >= _RELEASE:
            release_pages()
            self._held = 0
        super().add(nbytes)


def _shards(tensors: Mapping[str, Tensor], shard_bytes: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], counter: _Counter) -> None:
    names = sorted(tensors, key=lambda name: (-DTYPE_BITS[DTYPES[tensors[name].encoding.name]], name))
    header = _header(tensors, names, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            data = tensors[name].data
            for begin in range(0, data.size, _PIECE):
                piece = data[begin : begin + _PIECE]
                file.write(piece.data)
                counter.add(piece.size)
            del data


def _header(tensors: Mapping[str, Tensor], names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        if name == METADATA:
            raise ValueError(f"a tensor cannot be called {METADATA}")
        begin, end = end, end + tensors[name].nbytes
        content[name] = {
            "dtype": DTYPES[tensors[name].encoding.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{len(names)} tensors need a header of {len(text)} bytes; {MAX_HEADER} are allowed")
    return len(text).to_bytes(8, "little") + text
