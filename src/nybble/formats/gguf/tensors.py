"""The tensors of a GGUF file: their descriptions, checked against the file, and views of their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nybble.checkpoint.encodings import Encoding, from_ggml_type
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.formats.gguf.big_endian import to_little_endian
from nybble.formats.gguf.cursor import ByteOrder, Cursor

MAX_DIMENSIONS = 4
MAX_NAME = 65535  # bytes, as for keys; llama.cpp reads at most 63
_MAX_ELEMENTS = 2**63 - 1
SMALLEST_INFO = 8 + 1 + 4 + 4 + 8
"""Bytes of the shortest description: name of one letter, no dimensions, type, offset."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is row-major (GGUF's dimensions reversed)."""

    __slots__ = ("encoding", "name", "nbytes", "offset", "shape")

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int
    """First byte of the data, from the start of its file."""
    nbytes: int


def read_info(cursor: Cursor) -> TensorInfo:
    """The description at the cursor; ``offset`` is still relative to the data section.

    Raises:
        FormatError: out of bounds, bad name, dimensions, or a type that nobody reads.
    """
    start = cursor.position
    name = cursor.string("a tensor's name", MAX_NAME)
    if not name:
        raise cursor.error("a tensor has an empty name", start)
    where = cursor.position
    count = cursor.u32(f"the number of dimensions of tensor {name!r}")
    if count > MAX_DIMENSIONS:
        raise cursor.error(
            f"tensor {name!r} has {count} dimensions; at most {MAX_DIMENSIONS} are allowed", where
        )
    dimensions = [cursor.u64(f"dimension {index} of tensor {name!r}") for index in range(count)]
    elements = 1
    for index, size in enumerate(dimensions):
        elements *= size
        if size == 0 or elements > _MAX_ELEMENTS:
            problem = "is 0" if size == 0 else f"is {size}: more than {_MAX_ELEMENTS} elements"
            raise cursor.error(f"dimension {index} of tensor {name!r} {problem}", where + 4 + 8 * index)
    where = cursor.position
    number = cursor.u32(f"the type of tensor {name!r}")
    try:
        encoding = from_ggml_type(number)
    except UnsupportedError as error:
        raise cursor.error(f"tensor {name!r}: {error}", where) from None
    row = dimensions[0] if dimensions else 1
    if row % encoding.block_size:
        raise cursor.error(
            f"tensor {name!r} has rows of {row} elements;"
            f" {encoding.name} needs a multiple of {encoding.block_size}",
            start,
        )
    offset = cursor.u64(f"the offset of tensor {name!r}")
    return TensorInfo(name, tuple(reversed(dimensions)), encoding, offset, encoding.nbytes(elements))


def place(cursor: Cursor, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The tensors by name with offsets from the start of the file.

    The cursor stands behind the last description.

    Raises:
        FormatError: a name twice, an offset that is not aligned, data outside the file or
            overlapping other data.
    """
    start = -(-cursor.position // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in placed:
            raise cursor.error(f"tensor {info.name!r} is described twice")
        if info.offset % alignment:
            raise cursor.error(
                f"tensor {info.name!r} lies at offset {info.offset} of the data,"
                f" not a multiple of the alignment {alignment}"
            )
        first = start + info.offset
        if first + info.nbytes > cursor.size:
            raise cursor.error(
                f"tensor {info.name!r} needs bytes {first} to {first + info.nbytes},"
                f" but the file has {cursor.size} (an incomplete download?)"
            )
        placed[info.name] = TensorInfo(info.name, info.shape, info.encoding, first, info.nbytes)
    end, before = 0, ""
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.error(
                f"tensor {info.name!r} at byte {info.offset} overlaps tensor {before!r},"
                f" which ends at byte {end}"
            )
        end, before = info.offset + info.nbytes, info.name
    return placed


class TensorMap(Mapping[str, Tensor]):
    """Tensors by GGUF name, in the file's order; each look-up makes a view of the mapped file.

    Data of a big-endian file is copied and swapped at each look-up.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], cursor: Cursor) -> None:
        self._infos = infos
        self._cursor = cursor

    @property
    def byte_order(self) -> ByteOrder:
        """Byte order of the file."""
        return self._cursor.byte_order

    def __getitem__(self, name: str) -> Tensor:
        info = self._infos[name]
        data = np.frombuffer(self._cursor.data, np.uint8, info.nbytes, info.offset)
        if self._cursor.byte_order == "big":
            data = to_little_endian(data, info.encoding, f"{self._cursor.source}: tensor {name!r}")
        return Tensor(info.name, info.shape, info.encoding, data)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)
