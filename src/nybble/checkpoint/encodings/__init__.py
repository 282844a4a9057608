"""The table of encodings: how numbers lie in bytes, one row a type.

Rows are in one file a family; a new type is a row in its family's ``ROWS``. Names are lower-case
and the same as in ``native/core/encoding.h``. Group-wise affine integers (``int4_g32_f16``) have too
many rows for a table: ``affine.py`` makes them from the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nybble.checkpoint.encodings import affine, iq, k_quants, legacy, mx, plain, ternary
from nybble.checkpoint.encodings.base import Encoding
from nybble.errors import UnsupportedError

__all__ = ["ENCODINGS", "REMOVED_GGML_TYPES", "Encoding", "encoding", "from_ggml_type"]

ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {
        row.name: row
        for rows in (plain.ROWS, legacy.ROWS, k_quants.ROWS, iq.ROWS, ternary.ROWS, mx.ROWS)
        for row in rows
    }
)
"""Every encoding of the table by name."""

REMOVED_GGML_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "q4_2",
        5: "q4_3",
        31: "q4_0_4_4",
        32: "q4_0_4_8",
        33: "q4_0_8_8",
        36: "iq4_nl_4_4",
        37: "iq4_nl_4_8",
        38: "iq4_nl_8_8",
    }
)
"""Type numbers that GGUF once had. Nothing writes them any more, and nobody reads them."""

_BY_GGML_TYPE: Mapping[int, Encoding] = MappingProxyType(
    {row.ggml_type: row for row in ENCODINGS.values() if row.ggml_type is not None}
)


def encoding(name: str) -> Encoding:
    """The encoding of that name.

    Raises:
        UnsupportedError: there is none; the message lists the known ones.
    """
    row = ENCODINGS.get(name)
    if row is not None:
        return row
    form = affine.affine_format(name)
    if form is not None:
        return affine.affine_encoding(
            form.bits, form.group_size, form.scale, zero_point=form.has_zero_point, minimum=form.has_minimum
        )
    known = f"{', '.join(ENCODINGS)}, and affine ones such as int4_g32_f16, int4_g128_f16_z, int4_g32_f16_m"
    raise UnsupportedError(f"unknown encoding {name!r}; known: {known}")


def from_ggml_type(number: int) -> Encoding:
    """The encoding with that type number in GGUF.

    Raises:
        UnsupportedError: the number is unknown, or its type was removed from GGUF.
    """
    row = _BY_GGML_TYPE.get(number)
    if row is not None:
        return row
    if number in REMOVED_GGML_TYPES:
        raise UnsupportedError(
            f"type number {number} is {REMOVED_GGML_TYPES[number]}, which was removed from GGUF;"
            " convert the model again with current tools"
        )
    known = ", ".join(f"{row.ggml_type} {row.name}" for row in _BY_GGML_TYPE.values())
    raise UnsupportedError(f"unknown type number {number}; known: {known}")
