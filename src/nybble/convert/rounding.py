"""Rounding: what makes the blocks of a tensor that a conversion rounds, in place of plain rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nybble.checkpoint.encodings import Encoding
from nybble.checkpoint.tensor import Tensor
from nybble.convert.manifest import FileHash
from nybble.convert.relation import Quantize


@dataclass(frozen=True)
class Rounding:
    """``of`` gives what rounds a tensor into an encoding, or None: the encoding's own rounding.

    ``recipe`` and ``inputs`` go into the manifest: what decided, and the files that it was read from.
    """

    of: Callable[[Tensor, Encoding], Quantize | None]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[FileHash, ...] = ()
