"""llama.cpp's own quantizer, through ctypes: ``ggml_quantize_chunk`` of its library ggml-base.

The library is in the ``lib`` folder of an installed ``llama_cpp``: ``libggml-base.so`` (``.dylib``,
``.dll``). Any interpreter can load it.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import ENCODINGS

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

NEEDS_IMPORTANCE = frozenset({"iq2_xxs", "iq2_xs"})
"""Types that llama.cpp does not quantize without an importance matrix."""


class GgmlQuantizer:
    """The functions of one library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._chunk = self._library.ggml_quantize_chunk
        pointer = ctypes.c_void_p
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
        self._chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_init.argtypes = [ctypes.c_int]

    def prepare(self, name: str) -> None:
        """Makes the tables of a type, which is done once a process."""
        self._library.ggml_quantize_init(ENCODINGS[name].ggml_type)

    def quantize(
        self, values: Floats, name: str, importance: Floats | None = None, threads: int = 1
    ) -> Bytes:
        """Blocks of float32 (rows, columns): flat uint8; rows are dealt to the threads in equal runs."""
        row = ENCODINGS[name]
        assert row.ggml_type is not None
        matrix = np.ascontiguousarray(values, np.float32)
        rows, columns = matrix.shape
        out = np.empty((rows, row.nbytes(columns)), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        pointer = None if weights is None else weights.ctypes.data
        self.prepare(name)

        def work(bounds: tuple[int, int]) -> None:
            first, count = bounds[0], bounds[1] - bounds[0]
            self._chunk(
                row.ggml_type,
                matrix.ctypes.data,
                out.ctypes.data,
                first * columns,
                count,
                columns,
                pointer,
            )

        edges = [rows * k // threads for k in range(threads + 1)]
        if threads == 1:
            work((0, rows))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, pairwise(edges)))
        return out.reshape(-1)
