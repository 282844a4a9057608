"""Choice: what the caller of a conversion said about encodings and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Choice:
    """Encodings by name, and whether loss is allowed.

    ``encoding`` is for every matrix, ``encodings`` for tensors whose canonical names match a pattern
    (``*.mlp.*``); of several the first counts, and they come before ``encoding``.
    """

    encoding: str | None = None
    encodings: Mapping[str, str] = field(default_factory=dict)
    allow_lossy: bool = False

    def named(self, name: str) -> str | None:
        """The encoding that a pattern gives to the tensor of this name."""
        return next((kind for pattern, kind in self.encodings.items() if fnmatchcase(name, pattern)), None)
