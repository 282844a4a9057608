"""Mapped files: opened read-only, and their pages given back when a long conversion has used them.

A page of a mapped file counts as the process's memory once it was read, until the system wants it
back. Conversions that stream through files larger than memory give pages back themselves.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from pathlib import Path

from nybble.errors import FormatError, NotFoundError

_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def map_file(path: Path, kind: str) -> mmap.mmap:
    """A file as read-only memory. ``kind`` is what the caller needs, for messages (``a GGUF file``).

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is empty.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise NotFoundError(f"{path}: {problem}; {kind} is needed")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError(f"{path}: the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    track(data)
    return data


def track(data: mmap.mmap) -> None:
    """Makes a mapping that was opened elsewhere one of those whose pages are given back."""
    _advise(data, "MADV_HUGEPAGE")  # pages of 2 MB: a tenth faster to stream weights from
    _mapped.add(data)


def release_pages() -> None:
    """Gives back the memory of all mapped files; what is needed again is read again.

    Views stay valid. Does nothing where the system has no such call.
    """
    for data in list(_mapped):
        _advise(data, "MADV_DONTNEED")


def _advise(data: mmap.mmap, name: str) -> None:
    """Only advice: systems and file systems without it answer with an error, which changes nothing."""
    advice = getattr(mmap, name, None)
    if advice is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed meanwhile
            data.madvise(advice)
