"""Writing GGUF files, version 3, little-endian: metadata and tensors, one tensor in memory at a time.

The same input gives the same bytes. The layout is drawn in ``reader.py``; tensors lie in the order
that they are given in, each at the next multiple of the alignment. A model may be split into several
files as llama.cpp's ``gguf-split`` does: the first has all metadata, each has ``split.no``,
``split.count`` and ``split.tensors.count``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nybble.checkpoint.tensor import Tensor
from nybble.formats.gguf.metadata import GGUFMetadata, metadata_types
from nybble.formats.gguf.reader import DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_KEY
from nybble.formats.gguf.split import MAX_PARTS
from nybble.formats.gguf.tensors import MAX_DIMENSIONS
from nybble.formats.gguf.write_values import write_string, write_value
from nybble.formats.output import Progress, WriteCounter

VERSION = 3
MAX_TENSOR_NAME = 63
"""Bytes of a tensor's name that llama.cpp reads."""
_ALIGNMENT_KEY = "general.alignment"
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def write_file(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Sequence[Tensor],
    *,
    split_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes a GGUF file, or several.

    Args:
        path: the file. When the model is split, its name without ``.gguf`` is what the parts' names
            start with (``name-00001-of-00003.gguf``), and no file of this name itself is written.
        metadata: values by key, in the order of the file; see ``write_values.py`` for what they may
            be. ``general.alignment`` is obeyed. Keys of an earlier split are left out.
        tensors: with GGUF names; only one's data is asked for at a time.
        split_bytes: most bytes of tensors in a file, except where one tensor alone is larger. None,
            or enough for all: one file.
        progress: called before the first tensor and after each piece.

    Returns:
        The files in order.

    Raises:
        ValueError: a value, name, shape or encoding that GGUF cannot hold.
    """
    metadata_values = {key: value for key, value in metadata.items() if key not in _SPLIT_KEYS}
    types = metadata_types(metadata)
    alignment = _alignment(metadata_values)
    _check_tensors(tensors)
    parts = _parts(tensors, alignment, split_bytes)
    paths = _part_paths(path, len(parts))
    counter = WriteCounter(sum(tensor.nbytes for tensor in tensors), progress)
    counter.add(0)
    for number, (part_path, part) in enumerate(zip(paths, parts, strict=True)):
        values: dict[str, object] = dict(metadata_values) if number == 0 else {}
        if len(parts) > 1:
            if number and _ALIGNMENT_KEY in metadata_values:
                values[_ALIGNMENT_KEY] = metadata_values[_ALIGNMENT_KEY]
            # The types are gguf-split's.
            values["split.no"] = np.uint16(number)
            values["split.count"] = np.uint16(len(parts))
            values["split.tensors.count"] = np.int32(len(tensors))
        with part_path.open("wb") as out:
            _write_header(out, GGUFMetadata(values, types), part, alignment)
            for tensor in part:
                _write_data(out, tensor, counter)
                _pad(out, tensor.nbytes, alignment)
    return paths


def _write_header(out: BinaryIO, metadata: GGUFMetadata, tensors: Sequence[Tensor], alignment: int) -> None:
    """Everything before the first tensor's data."""
    out.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        if not key or len(key.encode()) > MAX_KEY:
            raise ValueError(
                f"key {key[:60]!r} is {len(key.encode())} bytes long; 1 to {MAX_KEY} are allowed"
            )
        write_string(out, key)
        write_value(out, key, value, metadata.types.get(key))
    offset = 0
    for tensor in tensors:
        write_string(out, tensor.name)
        dimensions = tuple(reversed(tensor.shape))
        out.write(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        out.write(struct.pack("<IQ", tensor.encoding.ggml_type, offset))
        offset += _aligned(tensor.nbytes, alignment)
    if tensors:
        _pad(out, out.tell(), alignment)


_PIECE = 16 << 20  # bytes handed to the system at a time: progress moves within large tensors


def _write_data(out: BinaryIO, tensor: Tensor, counter: WriteCounter) -> None:
    data = tensor.data
    if data.size != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} has {data.size} bytes of data; {tensor.nbytes} are needed")
    for start in range(0, data.size, _PIECE):
        piece = np.ascontiguousarray(data[start : start + _PIECE])
        out.write(piece.data)
        counter.add(piece.size)


def _pad(out: BinaryIO, position: int, alignment: int) -> None:
    out.write(bytes(_aligned(position, alignment) - position))


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _alignment(metadata: Mapping[str, object]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    number = value.item() if isinstance(value, np.generic) else value
    if not isinstance(number, int) or number < 1 or number & (number - 1) or number > MAX_ALIGNMENT:
        raise ValueError(f"{_ALIGNMENT_KEY} is {value!r}; a power of two from 1 to {MAX_ALIGNMENT} is needed")
    return number


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        name, encoding = tensor.name, tensor.encoding
        if name in names:
            raise ValueError(f"tensor {name!r} is there twice")
        names.add(name)
        if not name or len(name.encode()) > MAX_TENSOR_NAME:
            raise ValueError(
                f"tensor {name!r} has a name of {len(name.encode())} bytes;"
                f" 1 to {MAX_TENSOR_NAME} are allowed"
            )
        if encoding.ggml_type is None:
            raise ValueError(f"tensor {name!r} is {encoding.name}, which GGUF does not have")
        if len(tensor.shape) > MAX_DIMENSIONS or 0 in tensor.shape:
            raise ValueError(
                f"tensor {name!r} has the shape {tensor.shape};"
                f" at most {MAX_DIMENSIONS} sizes above 0 are allowed"
            )
        row = tensor.shape[-1] if tensor.shape else 1
        if row % encoding.block_size:
            raise ValueError(
                f"tensor {name!r} has rows of {row} elements;"
                f" {encoding.name} needs a multiple of {encoding.block_size}"
            )


def _parts(tensors: Sequence[Tensor], alignment: int, split_bytes: int | None) -> list[list[Tensor]]:
    """The tensors of each file."""
    if split_bytes is None:
        return [list(tensors)]
    if split_bytes < 1:
        raise ValueError(f"split_bytes is {split_bytes}; it must be above 0")
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _aligned(tensor.nbytes, alignment)
        if parts[-1] and size + nbytes > split_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += nbytes
    # split.no is a uint16.
    if len(parts) > min(MAX_PARTS, 65535):
        raise ValueError(f"split_bytes {split_bytes} makes {len(parts)} files; at most 65535 are allowed")
    return parts


def _part_paths(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    base = path.name[: -len(".gguf")] if path.name.endswith(".gguf") else path.name
    return [path.with_name(f"{base}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
