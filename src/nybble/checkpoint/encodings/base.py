"""Encoding: how numbers lie in bytes. One row a type; the table is in ``__init__``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Encoding:
    """A block encoding.

    A row of ``n`` elements takes ``n / block_size * block_bytes`` bytes; ``n`` is a multiple of
    ``block_size``. ``dequantize`` takes flat uint8 of whole blocks and returns flat float32 (or
    the natural NumPy dtype for plain integer and f64 data); ``quantize`` is the reverse where a
    reference is defined.
    """

    name: str
    block_size: int
    """Elements in a block."""
    block_bytes: int
    """Bytes of a block."""
    dequantize: Callable[[Bytes], Floats]
    quantize: Callable[[Floats], Bytes] | None
    layout: str
    """The block's bytes, drawn."""
    source: str
    """Where the layout is specified."""
    ggml_type: int | None = None
    """The type's number in GGUF, if it has one."""
    spare_bits: int = 0
    """Bits of a block that are there in memory alone: files pack zero points as closely as codes."""

    @property
    def bits_per_weight(self) -> float:
        """Bits that one element takes in a file, scales included."""
        return (8.0 * self.block_bytes - self.spare_bits) / self.block_size

    def stored_bytes(self, elements: int) -> int:
        """Bytes of ``elements`` elements in a file; what a format pads or aligns is not counted."""
        blocks = self.nbytes(elements) // self.block_bytes
        return -(-blocks * (8 * self.block_bytes - self.spare_bits) // 8)

    def nbytes(self, elements: int) -> int:
        """Bytes of ``elements`` elements in memory.

        Raises:
            ValueError: ``elements`` is not a multiple of ``block_size``.
        """
        if elements % self.block_size:
            raise ValueError(
                f"{self.name}: {elements} elements are not a multiple of the block size {self.block_size}"
            )
        return elements // self.block_size * self.block_bytes
