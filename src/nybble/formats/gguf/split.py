"""GGUF files split into parts: ``name-00001-of-00003.gguf`` and so on.

Every part is a whole GGUF file; the first has the model's metadata. Keys: ``split.no`` (from 0),
``split.count``, ``split.tensors.count`` (of all parts). Written by llama.cpp's ``gguf-split``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nybble.errors import FormatError, NotFoundError

T = TypeVar("T")

MAX_PARTS = 99999  # five digits in the name
_NAME = re.compile(r"(?P<base>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def part_paths(path: Path, metadata: Mapping[str, object]) -> list[Path]:
    """The paths of all parts that the file at ``path`` belongs to; itself if it is not split.

    Raises:
        FormatError: ``split.count`` makes no sense or the file's name does not fit it.
        NotFoundError: a part is missing.
    """
    if "split.count" not in metadata:
        return [path]
    count = _integer(str(path), metadata, "split.count", 0, MAX_PARTS)
    if count <= 1:
        return [path]
    name = _NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise FormatError(
            f"{path}: a part of a model split into {count}: its name must end in -00001-of-{count:05}.gguf,"
            " so that the other parts can be found"
        )
    paths = [
        path.with_name(f"{name['base']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)
    ]
    if path not in paths:
        raise FormatError(f"{path}: the name says part {int(name['number'])}, but split.count is {count}")
    for part in paths:
        if not part.is_file():
            raise NotFoundError(f"{part}: no such file, but {path.name} needs all {count} parts")
    return paths


def check_parts(parts: Sequence[tuple[str, Mapping[str, object], Mapping[str, object]]]) -> None:
    """Checks that parts (name, metadata, tensors by name), in order, belong together.

    Raises:
        FormatError: number, count or total of tensors differ, or a tensor is in two parts.
    """
    owner: dict[str, str] = {}
    for index, (source, metadata, tensors) in enumerate(parts):
        count = _integer(source, metadata, "split.count", 0, MAX_PARTS)
        if count != len(parts):
            raise FormatError(f"{source}: split.count is {count}, but the model has {len(parts)} parts")
        number = _integer(source, metadata, "split.no", 0, MAX_PARTS)
        if number != index:
            raise FormatError(f"{source}: split.no is {number}; {index} is needed in this place")
        for name in tensors:
            if name in owner:
                raise FormatError(f"{source}: tensor {name!r} is also in {owner[name]}")
            owner[name] = source
    source, metadata, _ = parts[0]
    if "split.tensors.count" in metadata:
        total = _integer(source, metadata, "split.tensors.count", 0, 2**63 - 1)
        if total != len(owner):
            raise FormatError(
                f"{source}: split.tensors.count is {total}, but the parts hold {len(owner)} tensors"
            )


def _integer(source: str, metadata: Mapping[str, object], key: str, low: int, high: int) -> int:
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        problem = "is missing" if value is None else f"is {value!r}"
        raise FormatError(f"{source}: key {key!r} {problem}; an integer from {low} to {high} is needed")
    return value


class JoinedMap(Mapping[str, T]):
    """Several mappings without common keys, seen as one in their order."""

    def __init__(self, parts: Sequence[Mapping[str, T]]) -> None:
        self._parts = parts
        self._owner = {key: part for part in parts for key in part}

    def __getitem__(self, key: str) -> T:
        return self._owner[key][key]

    def __contains__(self, key: object) -> bool:
        return key in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)
