"""ONNX nodes, tensors and graphs as plain data; the protobuf is made of them at the very end.

Nothing here imports ``onnx``. Data of initializers is made when it is written, one group at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ElementType = Literal["f32", "f16", "bf16", "u8", "i8", "u4", "i4", "i32", "i64", "bool"]
Dimension = int | str
"""A size, or the name of one that is known at run time only."""

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "u8": np.uint8,
    "i8": np.int8,
    "u4": np.uint8,
    "i4": np.uint8,
    "i32": np.int32,
    "i64": np.int64,
    "bool": np.bool_,
}
"""How data of an element type is held; bf16 as its bits, 4-bit types two to a byte, low half first."""


@dataclass(frozen=True)
class OnnxValue:
    """An input or output of a graph."""

    name: str
    element_type: ElementType
    shape: tuple[Dimension, ...]


@dataclass(frozen=True)
class OnnxNode:
    """One node; an empty name among inputs or outputs stands for one that is left out."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """int, float, str, lists of them, a NumPy array or an ``OnnxGraph``."""
    domain: str = ""
    name: str = ""


@dataclass(frozen=True)
class Initializer:
    """A constant that is stored in the data file."""

    name: str
    element_type: ElementType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = int(np.prod(self.shape, dtype=np.int64))
        if self.element_type in ("u4", "i4"):
            return (count + 1) // 2
        return count * np.dtype(NUMPY_TYPES[self.element_type]).itemsize


@dataclass(frozen=True)
class InitializerGroup:
    """Initializers that are made together, as codes and scales of one weight are.

    ``make`` returns an array for each, of its NumPy type (any shape with as many bytes).
    ``aliases`` are further names, types and shapes of the same bytes: which initializer's, and what.
    """

    initializers: tuple[Initializer, ...]
    make: Callable[[], Sequence[npt.NDArray[Any]]]
    aliases: tuple[tuple[int, Initializer], ...] = ()


@dataclass(frozen=True)
class OnnxGraph:
    """Nodes in order, with what they read and write."""

    name: str
    nodes: tuple[OnnxNode, ...]
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    initializers: tuple[InitializerGroup, ...] = ()
