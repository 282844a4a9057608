"""What kept states are recognised by: the model's files and the tokens that their numbers come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.convert.manifest import input_files


def windows_digest(windows: Iterable[npt.ArrayLike]) -> str:
    """sha256 of the token ids of all windows, as hexadecimal digits."""
    digest = hashlib.sha256()
    for window in windows:
        ids = np.asarray(window, "<i4")
        digest.update(ids.size.to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()


def file_stamps(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each of the model's files: cheaper to compare than their contents."""
    files = [] if checkpoint.source is None else input_files(checkpoint.source, checkpoint.metadata)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
