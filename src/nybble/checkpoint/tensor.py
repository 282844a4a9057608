"""Tensor: a name, a shape, an encoding, and bytes that are a view of the file until changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nybble.checkpoint.encodings import Encoding


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    ``shape`` is row-major as in Hugging Face: a linear's weight is (out_features, in_features).
    ``data`` is a flat uint8 array of exactly the encoded size, rows one after another; it is a
    read-only view of the mapped file unless the tensor was changed.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    data: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Encoded size in bytes."""
        return int(self.data.nbytes)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as float32, in ``shape``; a copy."""
        return self.encoding.dequantize(self.data).reshape(self.shape)
