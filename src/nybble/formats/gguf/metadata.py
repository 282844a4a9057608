"""GGUFMetadata: keys and values of a file together with the types that the values have there.

A Python int may be any of eight types in a file. Readers keep the type, so that writing the same
metadata again gives the same bytes; where no type is known ``write_values.py`` has a rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from nybble.errors import FormatError


class GGUFMetadata(Mapping[str, object]):
    """Metadata in a file's order; does not change.

    ``types`` has the names that ``GGUFFile.value_types`` uses (``uint32``, ``array[string]``); a key
    that is absent there is written with the type that suits its value.
    """

    def __init__(self, values: Mapping[str, object], types: Mapping[str, str] | None = None) -> None:
        self._values = values
        self.types: Mapping[str, str] = MappingProxyType(
            {key: name for key, name in (types or {}).items() if key in values}
        )

    def __getitem__(self, key: str) -> object:
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<GGUFMetadata of {len(self)} keys>"

    def to_json(self, *, leave_out: Sequence[str] = ("tokenizer.",)) -> list[dict[str, Any]]:
        """Keys, types and values as JSON can hold them, in order: what a manifest keeps of a source.

        Keys that start with one of ``leave_out`` stay out: a vocabulary is long, and the tokenizer's
        files hold it.
        """
        rows: list[dict[str, Any]] = []
        for key, value in self.items():
            if key.startswith(tuple(leave_out)):
                continue
            row = {"key": key, "value": _plain(value)}
            if key in self.types:
                row["type"] = self.types[key]
            rows.append(row)
        return rows

    @classmethod
    def from_json(cls, rows: object) -> GGUFMetadata:
        """The reverse of ``to_json``.

        Raises:
            FormatError: this is not what ``to_json`` makes.
        """
        values: dict[str, object] = {}
        types: dict[str, str] = {}
        if not isinstance(rows, list):
            raise FormatError(f"GGUF metadata must be a list of keys, found {type(rows).__name__}")
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("key"), str) or "value" not in row:
                raise FormatError("GGUF metadata: every row needs a key (text) and a value")
            key, name = row["key"], row.get("type")
            if key in values:
                raise FormatError(f"GGUF metadata: key {key!r} is there twice")
            values[key] = row["value"]
            if isinstance(name, str):
                types[key] = name
        return cls(values, types)


def metadata_types(metadata: Mapping[str, object]) -> Mapping[str, str]:
    """The known types of any metadata: none where it is a plain mapping."""
    return metadata.types if isinstance(metadata, GGUFMetadata) else {}


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return list(value) if isinstance(value, bytes) else value
