"""Made: tensors that somebody has made already, which a conversion takes in place of the source's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nybble.checkpoint.tensor import Tensor
from nybble.convert.errors import ValueErrors
from nybble.convert.manifest import FileHash


@dataclass(frozen=True)
class MadeTensor:
    """One tensor, and what the report says of it."""

    tensor: Tensor
    """By its canonical name, rows in the order of the source's."""
    how: str
    """For people: ``quantized (gptq)``, ``divided by scales (awq)``."""
    errors: ValueErrors
    """What rounding lost."""


@dataclass(frozen=True)
class Made:
    """Tensors by canonical name; names that the source does not have are added.

    ``recipe`` and ``inputs`` go into the manifest: what decided, and the files that it was read from.
    """

    tensors: Mapping[str, MadeTensor]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[FileHash, ...] = ()
    notes: tuple[str, ...] = ()
    removed: frozenset[str] = frozenset()
    """Names of the source's tensors that there are no more."""
