"""The header of a safetensors file: its JSON, checked against the file before anything else is believed.

Format: 8 bytes with the header's length (little-endian), the header (a JSON object), then the data.
Each key of the object is a tensor with ``dtype``, ``shape`` and ``data_offsets`` (first byte and end, from
the start of the data); ``__metadata__`` holds strings. The tensors' data fill the file without gaps
or overlaps. Source: https://huggingface.co/docs/safetensors/en/index#format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nybble.errors import FormatError, UnsupportedError
from nybble.formats.json_text import parse_object

MAX_HEADER = 100_000_000
"""Most bytes of a header, as in the format's own library."""
MAX_DIMENSIONS = 32
METADATA = "__metadata__"
_MAX_ELEMENTS = 2**63 - 1

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F64": 64,
        "F32": 32,
        "F16": 16,
        "BF16": 16,
        "I64": 64,
        "I32": 32,
        "I16": 16,
        "I8": 8,
        "U64": 64,
        "U32": 32,
        "U16": 16,
        "U8": 8,
        "BOOL": 8,
        "C64": 64,
        "F8_E4M3": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
    }
)
"""Every dtype of the format, and the bits of an element."""

ENCODINGS: Mapping[str, str] = MappingProxyType(
    {
        "F64": "f64",
        "F32": "f32",
        "F16": "f16",
        "BF16": "bf16",
        "I64": "i64",
        "I32": "i32",
        "I16": "i16",
        "I8": "i8",
    }
)
"""The dtypes whose values nybble has an encoding for, and its name."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is row-major."""

    __slots__ = ("dtype", "name", "nbytes", "offset", "shape")

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte of the data, from the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a header says, checked."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of their data."""


def read_header(data: bytes | memoryview, size: int, source: str) -> Header:
    """The header of a file.

    Args:
        data: the file, or at least everything up to the header's end.
        size: bytes of the whole file.
        source: the file's name, for messages.

    Raises:
        FormatError: it is not a valid safetensors file.
        UnsupportedError: a tensor has a dtype that is not known.
    """
    if size < 8:
        raise FormatError(f"{source}: has {size} bytes; the header's length alone takes 8 (truncated?)")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"{source}: claims a header of {length} bytes; at most {MAX_HEADER} are allowed:"
            " not a safetensors file"
        )
    if 8 + length > size:
        raise FormatError(
            f"{source}: the header takes {length} bytes, but {size - 8} follow its length (truncated?)"
        )
    text = bytes(data[8 : 8 + length])
    if not text.startswith(b"{"):
        raise FormatError(f"{source}: at offset 8: the header starts with {text[:1]!r} instead of b'{{'")
    entries = parse_object(text, f"{source}: the header")
    metadata = _metadata(entries.pop(METADATA, {}), source)
    infos = [_entry(name, value, 8 + length, source) for name, value in entries.items()]
    return Header(metadata, MappingProxyType(_placed(infos, 8 + length, size, source)))


def _metadata(found: object, source: str) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{source}: the header's {METADATA} must be an object with text alone")
    return MappingProxyType(found)


def _entry(name: str, value: object, start: int, source: str) -> TensorInfo:
    where = f"{source}: tensor {name[:200]!r}"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: must be an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value.get("dtype"), _sizes(value, "shape"), _sizes(value, "data_offsets")
    if not isinstance(dtype, str):
        raise FormatError(f"{where}: dtype is missing or no text")
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedError(f"{where}: unknown dtype {dtype[:40]!r}; known: {', '.join(DTYPE_BITS)}")
    if shape is None:
        raise FormatError(f"{where}: shape is missing or no list of whole numbers from 0")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{where}: has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements * bits > _MAX_ELEMENTS:
            raise FormatError(f"{where}: shape {shape} has too many elements")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets must be two whole numbers from 0, in order")
    nbytes, rest = divmod(elements * bits, 8)
    if rest or offsets[1] - offsets[0] != nbytes:
        raise FormatError(
            f"{where}: data_offsets {offsets} span {offsets[1] - offsets[0]} bytes,"
            f" but {dtype} of shape {shape} takes {elements * bits / 8:g}"
        )
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(entry: dict[str, Any], key: str) -> list[int] | None:
    """A list of whole numbers from 0; None where it is anything else."""
    found = entry.get(key)
    if isinstance(found, list) and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in found):
        return found
    return None


def _placed(infos: list[TensorInfo], start: int, size: int, source: str) -> dict[str, TensorInfo]:
    """The tensors in the order of their data, which must fill the file from ``start`` on."""
    end, before = start, "the header"
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    for info in infos:
        if info.offset != end:
            problem = "overlaps" if info.offset < end else "leaves a gap after"
            raise FormatError(
                f"{source}: tensor {info.name[:200]!r} at byte {info.offset - start} of the data {problem}"
                f" {before}, which ends at byte {end - start}"
            )
        end, before = info.offset + info.nbytes, f"tensor {info.name[:200]!r}"
    if end != size:
        problem = "is incomplete" if end > size else "has more behind them"
        raise FormatError(
            f"{source}: the tensors' data end at byte {end}, but the file has {size} bytes: it {problem}"
        )
    return {info.name: info for info in infos}
