"""Fields: typed, range-checked look-ups in a model file's metadata, for every format's config table.

Files are hostile: a value of the wrong type or out of range is a FormatError that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from nybble.errors import FormatError, UnsupportedError

MAX_INTEGER = 2**31 - 1
"""The largest size that any field may have: every real one is far below."""
SMALLEST = 1e-12
"""The smallest value of a field that must be above 0: its inverse stays finite in float32."""


class Fields:
    """Metadata under a common prefix.

    ``where`` is put before every message (the file), ``prefix`` before every key. A field without
    a default is required. ``None`` in a file (JSON's null) counts as absent.
    """

    def __init__(self, values: Mapping[str, object], where: str, prefix: str = "") -> None:
        self._values = values
        self._where = where
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(self._prefix + key) is not None

    def error(self, key: str, problem: str) -> FormatError:
        """The error for a bad value of ``key``."""
        return FormatError(f"{self._where}: {self._prefix}{key} {problem}")

    def unsupported(self, key: str, problem: str) -> UnsupportedError:
        """The error for a value of ``key`` that is valid, but not supported."""
        return UnsupportedError(f"{self._where}: {self._prefix}{key} {problem}")

    def fields(self, key: str) -> Fields:
        """The mapping under ``key``, empty where absent."""
        value = self._values.get(self._prefix + key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, f"must be a mapping, found {_show(value)}")
        prefix = f"{self._prefix}{key}."
        return Fields({f"{prefix}{name}": item for name, item in (value or {}).items()}, self._where, prefix)

    @overload
    def integer(self, key: str, *, minimum: int = ..., maximum: int = ...) -> int: ...
    @overload
    def integer(self, key: str, default: int, *, minimum: int = ..., maximum: int = ...) -> int: ...
    @overload
    def integer(self, key: str, default: None, *, minimum: int = ..., maximum: int = ...) -> int | None: ...
    def integer(
        self, key: str, default: Any = ..., *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int | None:
        """A whole number in ``minimum .. maximum``; an array counts when all its items are equal."""
        value = self._get(key, default)
        if value is None:
            return None
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value):
            first = value[0]
            if any(item != first for item in value):
                raise self.unsupported(key, "differs between layers; one value for all is needed")
            value = first.item() if isinstance(first, np.generic) else first
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be a whole number, found {_show(value)}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"is {value}; {minimum} to {maximum} is allowed")
        return value

    @overload
    def number(self, key: str, *, minimum: float = ..., maximum: float = ...) -> float: ...
    @overload
    def number(self, key: str, default: float, *, minimum: float = ..., maximum: float = ...) -> float: ...
    @overload
    def number(
        self, key: str, default: None, *, minimum: float = ..., maximum: float = ...
    ) -> float | None: ...
    def number(
        self, key: str, default: Any = ..., *, minimum: float = 0.0, maximum: float = 1e12
    ) -> float | None:
        """A finite number in ``minimum .. maximum``."""
        value = self._get(key, default)
        return None if value is None else self._number(key, value, minimum, maximum)

    def positive(self, key: str, default: Any = ...) -> float:
        """A finite number above zero; ``default`` must not be None."""
        value: float = self.number(key, default)
        if value < SMALLEST:
            raise self.error(key, f"is {value}; it must be above 0")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"must be true or false, found {_show(value)}")
        return bool(value)

    def string(self, key: str, default: Any = ...) -> str:
        """Text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be text, found {_show(value)}")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Exactly ``count`` finite numbers above zero."""
        return tuple(self._number(key, item, SMALLEST, 1e12) for item in self._items(key, count))

    def booleans(self, key: str, count: int) -> tuple[bool, ...]:
        """At least ``count`` flags, given as true/false or 0/1; the rest is ignored."""
        items = self._items(key, None)
        if len(items) < count:
            raise self.error(key, f"has {len(items)} items; {count} are needed")
        for item in items:
            if item not in (0, 1):
                raise self.error(key, f"holds {_show(item)}; true or false is needed")
        return tuple(bool(item) for item in items[:count])

    def strings(self, key: str, count: int) -> tuple[str, ...]:
        """Exactly ``count`` strings."""
        items = self._items(key, count)
        for item in items:
            if not isinstance(item, str):
                raise self.error(key, f"holds {_show(item)}; text is needed")
        return tuple(items)

    def is_array(self, key: str) -> bool:
        """Whether the value is an array."""
        value = self._values.get(self._prefix + key)
        return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(self._prefix + key)
        if value is not None:
            return value.item() if isinstance(value, np.generic) else value
        if default is ...:
            raise self.error(key, "is missing")
        return default

    def _items(self, key: str, count: int | None) -> list[Any]:
        value = self._get(key, ...)
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise self.error(key, f"must be an array, found {_show(value)}")
        if count is not None and len(value) != count:
            raise self.error(key, f"has {len(value)} items; {count} are needed")
        if len(value) > MAX_INTEGER:
            raise self.error(key, "is too long")
        return value.tolist() if isinstance(value, np.ndarray) else list(value)

    def _number(self, key: str, value: object, minimum: float, maximum: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, found {_show(value)}")
        if not math.isfinite(value) or not minimum <= value <= maximum:
            raise self.error(key, f"is {value}; {minimum:g} to {maximum:g} is allowed")
        return float(value)


def _show(value: object) -> str:
    """A short, safe rendering of a bad value."""
    text = repr(value)
    return (
        f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"
    )
