"""Cursor: checked reads from the bytes of a GGUF file, and the errors that say where they failed.

Every read compares with the bytes that are there before it touches or allocates anything. Numbers
are Python's, so no sum or product overflows.
"""

from __future__ import annotations

import mmap
import struct
from typing import Literal

from nybble.errors import FormatError

Buffer = bytes | mmap.mmap
"""What a file's content may be: slices of both are ``bytes``."""
ByteOrder = Literal["little", "big"]

_STRUCTS = {
    "little": (struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from),
    "big": (struct.Struct(">I").unpack_from, struct.Struct(">Q").unpack_from),
}


class Cursor:
    """A position in a file's content. ``source`` is the file's name for messages."""

    __slots__ = ("byte_order", "data", "position", "size", "source", "unpack_u32", "unpack_u64")

    def __init__(self, data: Buffer, source: str, byte_order: ByteOrder, position: int = 0) -> None:
        self.data = data
        self.size = len(data)
        self.source = source
        self.byte_order = byte_order
        self.position = position
        self.unpack_u32, self.unpack_u64 = _STRUCTS[byte_order]

    @property
    def remaining(self) -> int:
        """Bytes after the position."""
        return self.size - self.position

    def error(self, problem: str, offset: int | None = None) -> FormatError:
        """The error for ``problem`` at ``offset`` (default: the position)."""
        return FormatError(
            f"{self.source}: at offset {self.position if offset is None else offset}: {problem}"
        )

    def need(self, nbytes: int, what: str) -> None:
        """Checks that ``nbytes`` are left for ``what``.

        Raises:
            FormatError: they are not.
        """
        if nbytes > self.size - self.position:
            raise self.error(
                f"{what} needs {nbytes} bytes, but the file ends {self.remaining} bytes later"
                " (truncated or corrupt)"
            )

    def u32(self, what: str) -> int:
        """The next uint32."""
        position = self.position
        if self.size - position < 4:
            self.need(4, what)
        self.position = position + 4
        value: int = self.unpack_u32(self.data, position)[0]
        return value

    def u64(self, what: str) -> int:
        """The next uint64."""
        position = self.position
        if self.size - position < 8:
            self.need(8, what)
        self.position = position + 8
        value: int = self.unpack_u64(self.data, position)[0]
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        """The next string: a uint64 length and that many bytes of UTF-8.

        Raises:
            FormatError: it is longer than ``limit`` or the file, or is not UTF-8.
        """
        start = self.position
        length = self.u64(what)
        if limit is not None and length > limit:
            raise self.error(f"{what} is {length} bytes long; at most {limit} are allowed", start)
        if length > self.size - self.position:
            self.need(length, what)
        position = self.position
        self.position = position + length
        try:
            return self.data[position : position + length].decode()
        except UnicodeDecodeError as error:
            raise self.error(
                f"{what} is not UTF-8 ({error.reason} at its byte {error.start})", position
            ) from None
