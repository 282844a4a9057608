"""A small GGUF writer for tests: it writes what it is told, defects included."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i",
    F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip

# name, value type, value; an array's value is (element type, elements).
Key = tuple[Any, int, Any]
# name, dimensions (innermost first), type number, data
TensorRow = tuple[Any, tuple[int, ...], int, bytes]


def number(order: str, letter: str, value: Any) -> bytes:
    return struct.pack(("<" if order == "little" else ">") + letter, value)


def string(order: str, text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return number(order, "Q", len(raw)) + raw


def value(order: str, kind: int, content: Any) -> bytes:
    """A value without its type; ``bytes`` are taken as they are for all types but strings."""
    if kind == STRING:
        return string(order, content)
    if isinstance(content, bytes):
        return content
    if kind == ARRAY:
        element, items = content
        head = number(order, "I", element) + number(order, "Q", len(items))
        return head + b"".join(value(order, element, item) for item in items)
    return number(order, LETTERS[kind], content)


def build(
    keys: Iterable[Key] = (),
    tensors: Iterable[TensorRow] = (),
    *,
    version: int = 3,
    order: str = "little",
    alignment: int = 32,
    key_count: int | None = None,
    tensor_count: int | None = None,
    offsets: dict[str, int] | None = None,
    dimension_counts: dict[str, int] | None = None,
    magic: bytes = b"GGUF",
    data: bytes | None = None,
) -> bytes:
    """A GGUF file. The named arguments replace what would be right."""
    keys, tensors = list(keys), list(tensors)
    out = magic + number(order, "I", version)
    out += number(order, "Q", len(tensors) if tensor_count is None else tensor_count)
    out += number(order, "Q", len(keys) if key_count is None else key_count)
    for name, kind, content in keys:
        out += string(order, name) + number(order, "I", kind) + value(order, kind, content)
    body = b""
    for name, dimensions, kind, content in tensors:
        body += bytes(-len(body) % alignment)
        offset = (offsets or {}).get(name, len(body))
        count = (dimension_counts or {}).get(name, len(dimensions))
        out += string(order, name) + number(order, "I", count)
        out += b"".join(number(order, "Q", size) for size in dimensions)
        out += number(order, "I", kind) + number(order, "Q", offset)
        body += content
    out += bytes(-len(out) % alignment) if tensors else b""
    return out + (body if data is None else data)
