"""Values of GGUF metadata: scalars, strings, and arrays that are decoded when they are looked at.

Opening a file only walks over an array to find its end and to check its bounds: a vocabulary of
262,144 strings costs some 30 ms and no memory.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError
from nybble.formats.gguf.cursor import Cursor

STRING, ARRAY = 8, 9
BOOL = 7
MAX_DEPTH = 8
"""How deep arrays may lie in arrays; no model needs more than one or two."""


@dataclass(frozen=True)
class Scalar:
    """A value type of fixed size: its name in the specification, ``struct`` letter and size."""

    name: str
    letter: str
    size: int


SCALARS: dict[int, Scalar] = {
    0: Scalar("uint8", "B", 1),
    1: Scalar("int8", "b", 1),
    2: Scalar("uint16", "H", 2),
    3: Scalar("int16", "h", 2),
    4: Scalar("uint32", "I", 4),
    5: Scalar("int32", "i", 4),
    6: Scalar("float32", "f", 4),
    BOOL: Scalar("bool", "?", 1),
    10: Scalar("uint64", "Q", 8),
    11: Scalar("int64", "q", 8),
    12: Scalar("float64", "d", 8),
}
"""https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (enum gguf_metadata_value_type)"""

TYPE_NAMES: dict[int, str] = {
    **{number: row.name for number, row in SCALARS.items()},
    STRING: "string",
    ARRAY: "array",
}

_UNPACK: dict[str, dict[int, Callable[[Any, int], tuple[Any, ...]]]] = {
    order: {number: struct.Struct(mark + row.letter).unpack_from for number, row in SCALARS.items()}
    for order, mark in (("little", "<"), ("big", ">"))
}
_SMALLEST = {STRING: 8, ARRAY: 12} | {number: row.size for number, row in SCALARS.items()}
"""Bytes that an element of an array takes at least."""


class StringArray(Sequence[str]):
    """An array of strings in a file, decoded when they are looked at; none is kept.

    Equal to any sequence with the same strings.
    """

    __slots__ = ("_count", "_cursor", "_key", "_start", "_starts")

    def __init__(self, cursor: Cursor, key: str, start: int, count: int) -> None:
        self._cursor = cursor
        self._key = key
        self._start = start
        self._count = count
        self._starts: array[int] | None = None

    def _not_utf8(self) -> FormatError:
        for index, item in enumerate(self.raw()):
            try:
                item.decode()
            except UnicodeDecodeError as error:
                return self._cursor.error(
                    f"string {index} of key {self._key!r} is not UTF-8"
                    f" ({error.reason} at its byte {error.start})",
                    self._start,
                )
        raise AssertionError("unreachable: one of them did not decode")

    def raw(self) -> Iterator[bytes]:
        """The bytes of each string, UTF-8 or not; nothing is kept."""
        data, unpack, position = self._cursor.data, self._cursor.unpack_u64, self._start
        for _ in repeat(None, self._count):
            end = position + 8 + unpack(data, position)[0]
            yield data[position + 8 : end]
            position = end

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if self._starts is None:
            for _ in self:  # FormatError if one of them is not UTF-8
                pass
            self._starts = array("Q", self._positions())
        if not -self._count <= index < self._count:
            raise IndexError(f"index {index} of {self._count} strings")
        start = self._starts[index]
        end = start + self._cursor.unpack_u64(self._cursor.data, start - 8)[0]
        return str(self._cursor.data[start:end], "utf-8")

    def __iter__(self) -> Iterator[str]:
        data, unpack, position = self._cursor.data, self._cursor.unpack_u64, self._start
        try:
            for _ in repeat(None, self._count):
                start = position + 8
                position = start + unpack(data, position)[0]
                yield str(data[start:position], "utf-8")
        except UnicodeDecodeError:
            raise self._not_utf8() from None

    def _positions(self) -> Iterator[int]:
        """Where the bytes of each string start."""
        data, unpack, position = self._cursor.data, self._cursor.unpack_u64, self._start
        for _ in repeat(None, self._count):
            yield position + 8
            position += 8 + unpack(data, position)[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return f"<StringArray of {self._count} strings, key {self._key!r}>"


class NestedArray(Sequence[Any]):
    """An array of arrays in a file: its elements are read when they are asked for."""

    __slots__ = ("_count", "_cursor", "_depth", "_items", "_key", "_start")

    def __init__(self, cursor: Cursor, key: str, start: int, count: int, depth: int) -> None:
        self._cursor = cursor
        self._key = key
        self._start = start
        self._count = count
        self._depth = depth
        self._items: list[Any] | None = None

    def _read(self) -> list[Any]:
        if self._items is None:
            cursor = Cursor(self._cursor.data, self._cursor.source, self._cursor.byte_order, self._start)
            self._items = [read_array(cursor, self._key, self._depth + 1) for _ in range(self._count)]
        return self._items

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._read()[index]

    def __repr__(self) -> str:
        return f"<NestedArray of {self._count} arrays, key {self._key!r}>"


Value = bool | int | float | str | npt.NDArray[Any] | StringArray | NestedArray
"""A metadata value. Arrays of numbers are read-only NumPy arrays of the file's own type."""


def read_value(cursor: Cursor, number: int, key: str) -> tuple[Value, str]:
    """The value of type ``number`` at the cursor, and the name of its type (``array[string]``).

    Raises:
        FormatError: unknown type, value out of the file's bounds, or not what its type allows.
    """
    row = SCALARS.get(number)
    if row is not None:
        return _scalar(cursor, number, row, key), row.name
    if number == STRING:
        return cursor.string(f"the value of key {key!r}"), "string"
    if number == ARRAY:
        # The element's type is peeked at for the name; read_array checks that it is there.
        start = cursor.position
        value = read_array(cursor, key, 1)
        inner: int = cursor.unpack_u32(cursor.data, start)[0]
        return value, f"array[{TYPE_NAMES[inner]}]"
    raise cursor.error(
        f"key {key!r} has value type {number}; known are 0 ({SCALARS[0].name}) to 12 ({SCALARS[12].name})",
        cursor.position - 4,
    )


def _scalar(cursor: Cursor, number: int, row: Scalar, key: str) -> bool | int | float:
    position = cursor.position
    if cursor.size - position < row.size:
        cursor.need(row.size, f"the value of key {key!r} ({row.name})")
    cursor.position = position + row.size
    if number == BOOL:
        byte = cursor.data[position]
        if byte > 1:
            raise cursor.error(f"key {key!r} is a bool of value {byte}; 0 or 1 is allowed", position)
        return byte == 1
    value: int | float = _UNPACK[cursor.byte_order][number](cursor.data, position)[0]
    return value


def read_array(cursor: Cursor, key: str, depth: int) -> npt.NDArray[Any] | StringArray | NestedArray:
    """The array at the cursor, which moves behind it. ``depth`` is 1 for an array that is a value."""
    number, count = _array_header(cursor, key, depth)
    start = cursor.position
    _skip_elements(cursor, number, count, key, depth)
    if number == STRING:
        return StringArray(cursor, key, start, count)
    if number == ARRAY:
        return NestedArray(cursor, key, start, count, depth)
    dtype = _dtype(cursor, number)
    view = np.frombuffer(cursor.data, dtype, count, start) if count else np.empty(0, dtype)
    array = view.astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array


def _dtype(cursor: Cursor, number: int) -> np.dtype[Any]:
    order = "<" if cursor.byte_order == "little" else ">"
    dtype: np.dtype[Any] = np.dtype(order + SCALARS[number].letter)
    return dtype


def _array_header(cursor: Cursor, key: str, depth: int) -> tuple[int, int]:
    """Type and number of elements, checked against the bytes that are left."""
    start = cursor.position
    number = cursor.u32(f"the array type of key {key!r}")
    count = cursor.u64(f"the array length of key {key!r}")
    smallest = _SMALLEST.get(number)
    if smallest is None:
        raise cursor.error(f"key {key!r} is an array of type {number}; known are 0 to 12", start)
    if number == ARRAY and depth >= MAX_DEPTH:
        raise cursor.error(f"key {key!r} holds arrays more than {MAX_DEPTH} deep", start)
    if count * smallest > cursor.size - cursor.position:
        raise cursor.error(
            f"key {key!r} claims {count} elements of type {TYPE_NAMES[number]}"
            f" (at least {count * smallest} bytes), but the file ends {cursor.remaining} bytes later",
            start + 4,
        )
    return number, count


def _skip_elements(cursor: Cursor, number: int, count: int, key: str, depth: int) -> None:
    """Moves the cursor over the elements and checks their bounds."""
    if number == STRING:
        _skip_strings(cursor, count, key)
    elif number == ARRAY:
        for _ in repeat(None, count):
            inner, inner_count = _array_header(cursor, key, depth + 1)
            _skip_elements(cursor, inner, inner_count, key, depth + 1)
    else:
        start = cursor.position
        cursor.position = start + count * SCALARS[number].size
        if number == BOOL and count:
            values = np.frombuffer(cursor.data, np.uint8, count, start)
            if values.max() > 1:
                index = int(values.argmax())
                raise cursor.error(
                    f"element {index} of key {key!r} is a bool of value {values[index]}; 0 or 1 is allowed",
                    start + index,
                )


def _skip_strings(cursor: Cursor, count: int, key: str) -> None:
    data, unpack, position = cursor.data, cursor.unpack_u64, cursor.position
    try:
        for _ in repeat(None, count):
            position += 8 + unpack(data, position)[0]
    except (struct.error, OverflowError):
        # A length led past the end: cheaper to find out this way than to compare each time.
        position = cursor.size + 1
    if position > cursor.size:
        raise _bad_string(cursor, count, key)
    cursor.position = position


def _bad_string(cursor: Cursor, count: int, key: str) -> FormatError:
    """The error for the first string of an array that does not fit."""
    for index in range(count):
        start = cursor.position
        try:
            length = cursor.u64(f"string {index} of key {key!r}")
            cursor.need(length, f"string {index} of key {key!r}")
        except FormatError as error:
            cursor.position = start
            return error
        cursor.position += length
    raise AssertionError("unreachable: one of them did not fit")
