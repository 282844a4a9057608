"""Reading GGUF files, versions 2 and 3 in either byte order: metadata and tensors, nothing copied.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    "GGUF", version u32, number of tensors u64, number of keys u64
    keys:     name string, value type u32, value
    tensors:  name string, number of dimensions u32, dimensions u64 (innermost first), type u32, offset u64
    padding to the alignment, then the tensors' data at their offsets

Files are hostile until shown otherwise: every size, count, offset and type is checked against the
bytes that are there before anything is allocated, and each defect is a ``FormatError`` that says
which file, where and what.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError
from nybble.formats.gguf import split
from nybble.formats.gguf.cursor import Buffer, ByteOrder, Cursor
from nybble.formats.gguf.tensors import SMALLEST_INFO, TensorInfo, TensorMap, place, read_info
from nybble.formats.gguf.values import Value, read_value
from nybble.formats.mapping import map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEY = 65535  # bytes
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
_SMALLEST_KEY = 8 + 1 + 4 + 1  # name of one letter, type, one byte

_OLD_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}


class GGUFFile:
    """An open GGUF file, or the parts of a split one.

    The file is mapped, not loaded: tensors and arrays of numbers are views of it.
    """

    path: Path | None
    """The file; the first part of a split one; None for a buffer."""
    paths: tuple[Path, ...]
    """Every file that is mapped."""
    version: int
    byte_order: ByteOrder
    alignment: int
    """Of the tensors' data, bytes."""
    metadata: Mapping[str, Value]
    """Values by key. See ``values.py`` for arrays."""
    value_types: Mapping[str, str]
    """The type that each value has in the file: ``uint32``, ``array[string]``, ..."""
    tensors: Mapping[str, Tensor]
    """Tensors by GGUF name (``blk.0.attn_q.weight``), shapes row-major."""
    infos: Mapping[str, TensorInfo]
    """Where each tensor lies in its file."""

    def __init__(self, data: Buffer, source: str) -> None:
        cursor = Cursor(data, source, _byte_order(data, source), position=4)
        self.path = None
        self.paths = ()
        self.byte_order = cursor.byte_order
        self.version = cursor.u32("the version")
        self._mapped: list[mmap.mmap] = []
        tensor_count, key_count = _counts(cursor)
        metadata: dict[str, Value] = {}
        value_types: dict[str, str] = {}
        for _ in range(key_count):
            _read_key(cursor, metadata, value_types)
        self.metadata = MappingProxyType(metadata)
        self.value_types = MappingProxyType(value_types)
        self.alignment = _alignment(cursor, metadata, value_types)
        infos = place(cursor, [read_info(cursor) for _ in range(tensor_count)], self.alignment)
        self.infos = MappingProxyType(infos)
        self.tensors = TensorMap(infos, cursor)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "<memory>") -> GGUFFile:
        """Reads a file's content.

        Raises:
            FormatError: it is not a valid GGUF file.
        """
        return cls(data, source)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Opens a file; of a split file, all parts, whichever of them is given.

        Raises:
            NotFoundError: the file, or a part of it, does not exist.
            FormatError: it is not a valid GGUF file, or the parts do not belong together.
        """
        path = Path(path)
        first = cls._open_one(path)
        try:
            part_paths = split.part_paths(path, first.metadata)
            if len(part_paths) == 1:
                return first
            return cls._join([first if part == path else cls._open_one(part) for part in part_paths])
        except BaseException:
            first.close()
            raise

    @classmethod
    def _open_one(cls, path: Path) -> GGUFFile:
        data = map_file(path, "a GGUF file")
        try:
            result = cls(data, str(path))
        except BaseException:
            data.close()
            raise
        result._mapped = [data]
        result.path = path
        result.paths = (path,)
        return result

    @classmethod
    def _join(cls, parts: list[GGUFFile]) -> GGUFFile:
        """The first part, with the tensors of all."""
        first = parts[0]
        split.check_parts([(str(part.path), part.metadata, part.infos) for part in parts])
        first.tensors = split.JoinedMap([part.tensors for part in parts])
        first.infos = split.JoinedMap([part.infos for part in parts])
        first.paths = tuple(path for part in parts for path in part.paths)
        first._mapped = [data for part in parts for data in part._mapped]
        return first

    def close(self) -> None:
        """Unmaps the file. Views that are still in use keep their part of it mapped."""
        self.metadata = MappingProxyType({})
        self.tensors = MappingProxyType({})
        mapped, self._mapped = self._mapped, []
        for data in mapped:
            with contextlib.suppress(BufferError):  # a view is alive: the mapping goes with the last one
                data.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<GGUFFile {self.path or 'in memory'}: version {self.version}, {self.byte_order}-endian,"
            f" {len(self.metadata)} keys, {len(self.infos)} tensors>"
        )


def _byte_order(data: Buffer, source: str) -> ByteOrder:
    """Checks magic and version; the version tells the byte order."""
    magic = data[:4]
    if magic != MAGIC:
        old = _OLD_MAGICS.get(magic)
        hint = f"this is {old}, a format before GGUF: convert the model again" if old else "not a GGUF file"
        raise FormatError(
            f"{source}: at offset 0: the file starts with {magic!r} instead of {MAGIC!r}; {hint}"
        )
    if len(data) < 8:
        raise FormatError(
            f"{source}: at offset 4: the version needs 4 bytes, but the file has {len(data)} (truncated)"
        )
    raw = data[4:8]
    orders: tuple[ByteOrder, ByteOrder] = ("little", "big")
    for order in orders:
        if int.from_bytes(raw, order) in VERSIONS:
            return order
    version = min(int.from_bytes(raw, "little"), int.from_bytes(raw, "big"))
    raise FormatError(
        f"{source}: at offset 4: GGUF version {version} is unknown; versions 2 and 3 can be read"
    )


def _counts(cursor: Cursor) -> tuple[int, int]:
    """Numbers of tensors and keys, checked against the file's size."""
    tensor_count = cursor.u64("the number of tensors")
    key_count = cursor.u64("the number of keys")
    for count, smallest, what, offset in (
        (tensor_count, SMALLEST_INFO, "tensors", 8),
        (key_count, _SMALLEST_KEY, "keys", 16),
    ):
        if count * smallest > cursor.remaining:
            raise cursor.error(
                f"the file claims {count} {what} (at least {count * smallest} bytes),"
                f" but only {cursor.remaining} bytes follow the header",
                offset,
            )
    return tensor_count, key_count


def _read_key(cursor: Cursor, metadata: dict[str, Value], value_types: dict[str, str]) -> None:
    start = cursor.position
    key = cursor.string("a key", MAX_KEY)
    if not key:
        raise cursor.error("a key is empty", start)
    if key in metadata:
        raise cursor.error(f"key {key!r} is there twice", start)
    number = cursor.u32(f"the value type of key {key!r}")
    metadata[key], value_types[key] = read_value(cursor, number, key)


def _alignment(cursor: Cursor, metadata: Mapping[str, Value], value_types: Mapping[str, str]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if value_types.get("general.alignment", "uint32") != "uint32" or not isinstance(value, int):
        raise cursor.error(
            f"general.alignment is of type {value_types['general.alignment']}; uint32 is needed"
        )
    if value == 0 or value & (value - 1) or value > MAX_ALIGNMENT:
        raise cursor.error(f"general.alignment is {value}; a power of two up to {MAX_ALIGNMENT} is needed")
    return value
