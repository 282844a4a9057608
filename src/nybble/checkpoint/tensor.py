"""Tensor: a name, a shape, an encoding, and bytes that are a view of the file until changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nybble.checkpoint.encodings import Encoding

Bytes = npt.NDArray[np.uint8]


class Tensor:
    """One tensor of a checkpoint; it does not change.

    ``shape`` is row-major as in Hugging Face: a linear's weight is (out_features, in_features).
    The bytes are flat uint8 of exactly the encoded size, rows one after another: a read-only view of
    the mapped file, or what a function makes of it. Such a function runs whenever ``data`` is asked
    for, so that a checkpoint of any size can stream; keep the result where it is needed twice.
    """

    __slots__ = ("_data", "encoding", "name", "shape")

    def __init__(
        self, name: str, shape: tuple[int, ...], encoding: Encoding, data: Bytes | Callable[[], Bytes]
    ) -> None:
        self.name = name
        self.shape = shape
        self.encoding = encoding
        self._data = data

    @property
    def data(self) -> Bytes:
        """The encoded bytes: uint8 (nbytes,)."""
        if not callable(self._data):
            return self._data
        data = self._data()
        if data.dtype != np.uint8 or data.shape != (self.nbytes,):
            raise ValueError(f"{self.name}: made {data.dtype} {data.shape} instead of {self.nbytes} bytes")
        return data

    @property
    def is_view(self) -> bool:
        """Whether ``data`` is at hand; otherwise each access computes it."""
        return not callable(self._data)

    @property
    def nbytes(self) -> int:
        """Encoded size in memory, bytes."""
        return self.encoding.nbytes(math.prod(self.shape))

    @property
    def stored_bytes(self) -> int:
        """Encoded size in a file, bytes."""
        return self.encoding.stored_bytes(math.prod(self.shape))

    def changed(
        self,
        *,
        name: str | None = None,
        shape: tuple[int, ...] | None = None,
        encoding: Encoding | None = None,
        data: Bytes | Callable[[], Bytes] | None = None,
    ) -> Tensor:
        """A tensor like this one, except for what is given."""
        return Tensor(
            self.name if name is None else name,
            self.shape if shape is None else shape,
            self.encoding if encoding is None else encoding,
            self._data if data is None else data,
        )

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as float32, in ``shape``; a copy."""
        return self.encoding.dequantize(self.data).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.shape}, {self.encoding.name})"
