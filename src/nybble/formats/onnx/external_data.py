"""Initializers: the arrays in an ONNX file, inside it or in files beside it, mapped and checked.

External data may only be a regular file in the model's folder or below: no absolute path, no
``..``, no link that leads out (CVE-2024-27318 and its relatives), no second hard link. Offset,
length and shape are checked against each other and the file's size before anything is read.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.mapping import track

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

MAX_RANK = 8
MAX_FILES = 4096

BITS: dict[int, tuple[str, int]] = {
    1: ("f32", 32),
    2: ("u8", 8),
    3: ("i8", 8),
    6: ("i32", 32),
    7: ("i64", 64),
    9: ("bool", 8),
    10: ("f16", 16),
    11: ("f64", 64),
    16: ("bf16", 16),
    21: ("u4", 4),
    22: ("i4", 4),
}
"""Element types by number in ``TensorProto.DataType``: short name and bits."""

STORAGE: dict[str, str] = {
    "f32": "<f4", "u8": "u1", "i8": "i1", "i32": "<i4", "i64": "<i8", "bool": "?", "f16": "<f2",
    "f64": "<f8", "bf16": "<u2",
}  # fmt: skip
"""NumPy types; bfloat16 as its bits."""


@dataclass(frozen=True)
class Initializer:
    """One stored array; nothing is read until ``bytes_`` or ``load`` is called."""

    name: str
    element: str
    """Short name of the element type."""
    shape: tuple[int, ...]
    source: Bytes | _External

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[object, ...]:
        """Where it lies: equal for two names of the same bytes."""
        if isinstance(self.source, np.ndarray):
            return (self.name,)
        return self.source.location, self.source.offset, self.source.length

    def bytes_(self) -> Bytes:
        """The stored bytes: flat, read-only, mapped where external."""
        return self.source if isinstance(self.source, np.ndarray) else self.source.read()

    def load(self) -> Array:
        """The array in its storage type and shape; a view but for 4-bit types, which become bytes."""
        data = self.bytes_()
        if self.element not in ("u4", "i4"):
            return data.view(STORAGE[self.element]).reshape(self.shape)
        codes: Bytes = np.empty(2 * data.size, np.uint8)
        codes[0::2], codes[1::2] = data & np.uint8(15), data >> np.uint8(4)
        codes = codes[: self.size].reshape(self.shape)
        return codes if self.element == "u4" else (((codes ^ np.uint8(8)).view(np.int8)) - np.int8(8))


@dataclass(frozen=True)
class _External:
    files: ExternalFiles
    location: str
    offset: int
    length: int

    def read(self) -> Bytes:
        return self.files.mapped(self.location)[self.offset : self.offset + self.length]


class ExternalFiles:
    """The data files of one model, each checked and mapped once."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._maps: dict[str, Bytes] = {}
        self._lock = threading.Lock()

    def mapped(self, location: str) -> Bytes:
        """A whole file of the folder, read-only.

        Raises:
            FormatError: the location is not allowed.
            NotFoundError: no such file.
        """
        with self._lock:
            found = self._maps.get(location)
            if found is None:
                if len(self._maps) >= MAX_FILES:
                    raise FormatError(f"more than {MAX_FILES} files of external data")
                found = self._maps[location] = _map(self._path(location))
        return found

    def _path(self, location: str) -> Path:
        if self._folder is None:
            raise FormatError(f"external data {location!r}: a model in memory has no folder")
        parts = PurePosixPath(location).parts
        windows = PureWindowsPath(location)
        if (
            not parts
            or "\0" in location
            or "\\" in location
            or PurePosixPath(location).is_absolute()
            or windows.drive
            or windows.root
            or ".." in parts
            or any(":" in part for part in parts)
        ):
            raise FormatError(
                f"external data {location!r}: only a relative path inside the model's folder is allowed"
            )
        root = self._folder.resolve()
        path = root.joinpath(*parts)
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise NotFoundError(f"external data {location!r} is missing in {root}: {error}") from None
        if not resolved.is_relative_to(root):
            raise FormatError(
                f"external data {location!r} is a link that leads out of {root}; copy the file there"
            )
        return resolved


def _map(path: Path) -> Bytes:
    # The path is resolved: a link put in its place since then is not followed.
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise NotFoundError(f"external data {path} cannot be opened: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"external data {path} is not a regular file")
        if status.st_nlink > 1:
            raise FormatError(
                f"external data {path} has a second hard link, so it may be a file from elsewhere; copy it"
            )
        if status.st_size == 0:
            return np.empty(0, np.uint8)
        data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        track(data)
        return np.frombuffer(data, np.uint8)
    finally:
        os.close(descriptor)


def initializer(tensor: onnx.TensorProto, files: ExternalFiles) -> Initializer:
    """A TensorProto, checked: its data has exactly the size that type and shape say.

    Raises:
        FormatError: sizes that do not fit, an offset out of the file, a forbidden location.
        UnsupportedError: an element type that is not known.
    """
    name = tensor.name
    if tensor.data_type not in BITS:
        raise UnsupportedError(f"initializer {name!r}: element type {tensor.data_type} is not supported")
    element, bits = BITS[tensor.data_type]
    shape = tuple(int(dim) for dim in tensor.dims)
    if len(shape) > MAX_RANK or any(dim < 0 for dim in shape):
        raise FormatError(f"initializer {name!r}: shape {shape}")
    nbytes = (math.prod(shape) * bits + 7) // 8
    if tensor.data_location == 1:
        return Initializer(name, element, shape, _external(tensor, files, nbytes))
    if tensor.HasField("raw_data"):
        data = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        data = _typed(tensor, element, math.prod(shape))
    if data.size != nbytes:
        raise FormatError(f"initializer {name!r}: {data.size} bytes, but {element} {shape} takes {nbytes}")
    return Initializer(name, element, shape, data)


def _external(tensor: onnx.TensorProto, files: ExternalFiles, nbytes: int) -> _External:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    where = f"initializer {tensor.name!r}"
    location = entries.get("location", "")

    def number(key: str, default: int) -> int:
        text = entries.get(key)
        if text is None or text == "":
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise FormatError(f"{where}: external {key} is {text[:40]!r}")
        return int(text)

    offset = number("offset", 0)
    length = number("length", nbytes)
    size = files.mapped(location).size
    if length != nbytes:
        raise FormatError(f"{where}: {length} bytes of external data, but its shape takes {nbytes}")
    if offset > size or length > size - offset:
        raise FormatError(
            f"{where}: bytes {offset} to {offset + length} are wanted, but {location} has {size}"
        )
    return _External(files, location, offset, length)


def _typed(tensor: onnx.TensorProto, element: str, count: int) -> Bytes:
    """Data in the typed fields; small arrays mostly."""
    if element in ("f32", "f64", "i64"):
        field = {"f32": tensor.float_data, "f64": tensor.double_data, "i64": tensor.int64_data}[element]
        return np.array(field, STORAGE[element]).reshape(-1).view(np.uint8)
    values = np.array(tensor.int32_data, np.int64).astype(np.int32)
    if element in ("u4", "i4"):  # two to an item
        return values.astype(np.uint8)
    kind = {"f16": "<u2", "bool": "u1"}.get(element, STORAGE[element])
    if values.size != count:
        raise FormatError(f"initializer {tensor.name!r}: {values.size} values, but its shape takes {count}")
    return values.astype(kind).reshape(-1).view(np.uint8)
