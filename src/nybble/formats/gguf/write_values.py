"""Values of GGUF metadata as bytes: the reverse of ``values.py``, little-endian.

Types, when the caller names none: a NumPy scalar or array has its own. Of Python's, a bool is
``bool``, text ``string``, a float ``float32``, an int ``uint32`` where it fits (else ``int32``,
``uint64`` or ``int64``); in arrays ints are ``int32`` where all fit, as gguf-py and llama.cpp have it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nybble.formats.gguf.values import ARRAY, SCALARS, STRING, TYPE_NAMES, NestedArray, StringArray

NUMBERS: dict[str, int] = {name: number for number, name in TYPE_NAMES.items()}
_LETTERS = {row.name: row.letter for row in SCALARS.values()}
_DTYPES = {name: np.dtype("?" if letter == "?" else f"<{letter}") for name, letter in _LETTERS.items()}
_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in _DTYPES.items()}
_ARRAY_INTS = ("int32", "int64", "uint64")
_INTS = ("uint32", "int32", "uint64", "int64")


def write_string(out: BinaryIO, text: str | bytes) -> None:
    """A string: uint64 length and its UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    out.write(struct.pack("<Q", len(raw)) + raw)


def write_value(out: BinaryIO, key: str, value: object, name: str | None = None) -> None:
    """A value with its type before it.

    Args:
        out: where to.
        key: for messages.
        value: bool, int, float, str, bytes (an array of uint8), NumPy scalar or array, or a sequence
            of these, which may hold sequences.
        name: the type (``uint32``, ``array[string]``, ...); None: the one that suits the value.

    Raises:
        ValueError: GGUF cannot hold the value, or not in this type.
    """
    try:
        if name is None:
            name = _type_of(value)
        if name.startswith("array"):
            out.write(struct.pack("<I", ARRAY))
            _write_array(out, value, name[6:-1] or None)
        elif name in NUMBERS:
            out.write(struct.pack("<I", NUMBERS[name]))
            _write_one(out, value, name)
        else:
            raise ValueError(f"unknown type {name!r}; known: {', '.join(NUMBERS)}")
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"key {key!r} cannot be written: {error}") from None


def _type_of(value: object) -> str:
    """The type of a value that nobody gave one."""
    if isinstance(value, np.ndarray | bytes | Sequence) and not isinstance(value, str):
        return "array[]"
    if isinstance(value, int) and not isinstance(value, bool):
        return _smallest(_INTS, value, value)
    return _scalar_type(value)


def _scalar_type(value: object) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, np.generic):
        return _dtype_name(value.dtype)
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float):
        return "float32"
    raise ValueError(f"GGUF has no type for {type(value).__name__}")


def _dtype_name(dtype: np.dtype[Any]) -> str:
    name = _NAMES.get((dtype.kind, dtype.itemsize))
    if name is None:
        raise ValueError(f"GGUF has no type for NumPy's {dtype}")
    return name


def _smallest(names: Iterable[str], low: int, high: int) -> str:
    for name in names:
        limits = np.iinfo(_DTYPES[name])
        if limits.min <= low and high <= limits.max:
            return name
    raise ValueError(f"{low if low < 0 else high} does not fit in 64 bits")


def _write_one(out: BinaryIO, value: object, name: str) -> None:
    """A scalar or string without its type."""
    if name == "string":
        if not isinstance(value, str | bytes):
            raise ValueError(f"text is needed, found {type(value).__name__}")
        write_string(out, value)
        return
    number = value.item() if isinstance(value, np.generic) else value
    if (name == "bool") != isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{name} is needed, found {type(value).__name__}")
    out.write(struct.pack("<" + _LETTERS[name], number))


def _write_array(out: BinaryIO, value: object, element: str | None) -> None:
    """Element type, count and elements."""
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    if isinstance(value, np.ndarray):
        if value.ndim == 1 and element in (None, _dtype_name(value.dtype)):
            name = _dtype_name(value.dtype)
            out.write(struct.pack("<IQ", NUMBERS[name], len(value)))
            out.write(np.ascontiguousarray(value.astype(_DTYPES[name], copy=False)).data)
            return
        value = list(value) if value.ndim else value.item()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"an array is needed, found {type(value).__name__}")
    element = element or _element_type(value)
    out.write(struct.pack("<IQ", NUMBERS[element], len(value)))
    if isinstance(value, StringArray):
        for raw in value.raw():  # also what is not UTF-8
            write_string(out, raw)
    elif element == "string":
        for item in value:
            _write_one(out, item, element)
    elif element == "array":
        for item in value:
            _write_array(out, item, None)
    else:
        out.write(_packed(value, element).data)


def _packed(value: Sequence[Any], element: str) -> npt.NDArray[Any]:
    """Numbers or flags of one type."""
    for item in value:
        number = item.item() if isinstance(item, np.generic) else item
        if (element == "bool") != isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"an element is {type(item).__name__}; all must be {element}")
        if _DTYPES[element].kind in "iu":
            limits = np.iinfo(_DTYPES[element])
            if not isinstance(number, int) or not limits.min <= number <= limits.max:
                raise ValueError(f"an element is {number}; all must be {element}")
    return np.array(value, _DTYPES[element])


def _element_type(value: Sequence[Any]) -> str:
    """The type that all elements of a sequence share."""
    if isinstance(value, StringArray):
        return TYPE_NAMES[STRING]
    if isinstance(value, NestedArray):
        return TYPE_NAMES[ARRAY]
    if not value:
        raise ValueError("the array is empty and its type is not known: give a NumPy array")
    if all(isinstance(item, np.ndarray | bytes | Sequence) and not isinstance(item, str) for item in value):
        return TYPE_NAMES[ARRAY]
    if all(type(item) is int for item in value):
        return _smallest(_ARRAY_INTS, min(value), max(value))
    if all(type(item) in (int, float) for item in value):
        return "float32"
    names = {_scalar_type(item) for item in value}
    if len(names) > 1:
        raise ValueError(f"an array holds one type, not {', '.join(sorted(names))}")
    return names.pop()
