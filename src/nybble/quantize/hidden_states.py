"""HiddenStates: what flows between two layers, for every token of a calibration, in memory or in a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from nybble.formats.output import require_space

Floats = npt.NDArray[np.float32]

MEMORY_LIMIT = 2 << 30
"""Bytes from which on hidden states go to a file."""


class HiddenStates:
    """A float32 matrix (tokens, hidden_size); beyond ``limit`` bytes a mapped temporary file in ``folder``.

    The file goes with the object, and with the process. float32, because a layer adds a little to
    what is there: rounding the sum to 16 bits after each would be an error that the model itself does
    not make.

    Raises:
        OutputError: the file does not fit on its disk.
    """

    def __init__(
        self, tokens: int, hidden_size: int, *, folder: Path | None = None, limit: int = MEMORY_LIMIT
    ) -> None:
        self._file: IO[bytes] | None = None
        nbytes = 4 * tokens * hidden_size
        if nbytes <= limit:
            self._values: Floats = np.empty((tokens, hidden_size), np.float32)
            return
        place = Path(tempfile.gettempdir()) if folder is None else folder
        require_space(place, nbytes)
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - lives as long as this object
        self._file.truncate(nbytes)
        self._values = np.memmap(self._file, np.float32, "r+", shape=(tokens, hidden_size))

    @property
    def values(self) -> Floats:
        """The matrix; writing to it changes the hidden states."""
        return self._values

    @property
    def is_mapped(self) -> bool:
        """Whether they are in a file."""
        return self._file is not None

    def close(self) -> None:
        """Give memory or file back; the matrix is empty afterwards."""
        self._values = np.empty((0, 0), np.float32)
        if self._file is not None:
            self._file.close()
            self._file = None
