"""JSON in model files, read with the care that hostile ones need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nybble.errors import FormatError, NotFoundError

MAX_FILE = 64 << 20
"""Most bytes of a JSON file beside a model; an index of 100,000 tensors has 10 MB."""
_MAX_DIGITS = 400  # tokenizer_config.json has numbers such as 10 ** 30


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        FormatError: not UTF-8, not JSON, not an object, half of a surrogate pair, nested too deeply, a
            number out of bounds, or a key that is there twice: readers do not agree on which counts.
    """

    def fail(problem: str) -> FormatError:
        return FormatError(f"{where}: {problem}")

    try:
        found = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique(fail),
            parse_int=_integer(fail),
            parse_constant=_constant(fail),
        )
    except UnicodeDecodeError as problem:
        raise fail(f"is not UTF-8: {problem.reason} at byte {problem.start}") from None
    except json.JSONDecodeError as problem:
        raise fail(f"is not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}") from None
    except RecursionError:
        raise fail("is nested too deeply") from None
    if b"\\u" in text and not _is_unicode(found):
        raise fail("holds half of a surrogate pair, which is no Unicode")
    if not isinstance(found, dict):
        raise fail(f"must hold an object, not a {type(found).__name__}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is too large, or as ``parse_object``.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_FILE:
        raise FormatError(f"{path}: has {size} bytes; at most {MAX_FILE} are read")
    return parse_object(path.read_bytes(), str(path))


def read_object_if_there(path: Path) -> dict[str, Any]:
    """As ``read_object``; empty where there is no such file."""
    return read_object(path) if path.is_file() else {}


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file: two spaces, the given order, a new line at the end; same content, same bytes."""
    text = json.dumps(content, indent=2, allow_nan=False)
    path.write_bytes(text.encode("ascii") + b"\n")


Fail = Callable[[str], FormatError]


def _unique(fail: Fail) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise fail(f"has the key {key[:100]!r} twice")
                seen.add(key)
        return found

    return check


def _is_unicode(found: object) -> bool:
    """Whether all strings can be encoded."""
    stack: list[object] = [found]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                return False
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
    return True


def _integer(fail: Fail) -> Callable[[str], int]:
    def convert(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise fail(f"holds a number of {len(digits)} digits")
        return int(digits)

    return convert


def _constant(fail: Fail) -> Callable[[str], float]:
    def convert(name: str) -> float:
        raise fail(f"holds {name}, which is not JSON")

    return convert
