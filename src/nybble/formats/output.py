"""Outputs that appear only when they are complete.

A file or folder is written beside its final name, in ``<name>.partial``, flushed to the disk and
renamed at the end. Whatever happens before that, nothing has the final name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nybble.errors import NybbleError

PARTIAL = ".partial"

Progress = Callable[[int, int], None]
"""Called by a writer after each piece with the bytes written so far, and all that will be."""

Note = Callable[[str], None]
"""Takes a sentence for the person who asked for the output."""


def unheard(sentence: str) -> None:
    """A Note that nobody hears."""


class OutputError(NybbleError):
    """An output exists already, cannot be written, or does not fit on the disk."""


class WriteCounter:
    """Adds up what is written and reports it."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def add(self, nbytes: int) -> None:
        """Note that ``nbytes`` more were written."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def staged_file(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path to write a file to; it becomes ``target`` when the block ends without an error.

    Raises:
        OutputError: ``target`` exists and ``overwrite`` is False, or its folder cannot be written.
    """
    with _staged(target, overwrite) as partial:
        yield partial
        _flush(partial)
        os.replace(partial, target)
        _flush_folder(target.parent)


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to write to; it becomes ``target`` when the block ends without an error.

    An old folder of that name is replaced as a whole.

    Raises:
        OutputError: ``target`` exists and ``overwrite`` is False, or its folder cannot be written.
    """
    with _staged(target, overwrite) as partial:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _flush(path)
        if target.exists():
            old = target.with_name(target.name + ".replaced")
            _remove(old)
            os.replace(target, old)
            os.replace(partial, target)
            _remove(old)
        else:
            os.replace(partial, target)
        _flush_folder(target.parent)


@contextmanager
def _staged(target: Path, overwrite: bool) -> Iterator[Path]:
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; name another output or allow it to be overwritten")
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of a run that was killed
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    try:
        yield partial
    except OSError as error:
        _remove_quietly(partial)
        raise OutputError(f"{target} was not written: {error}") from error
    except BaseException:
        _remove_quietly(partial)
        raise


def require_space(folder: Path, nbytes: int) -> None:
    """Checks that ``nbytes`` fit on the disk of ``folder``, which need not exist yet.

    Raises:
        OutputError: they do not; the message says how much is free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise OutputError(
            f"{folder}: the output takes {nbytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free"
        )


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_quietly(path: Path) -> None:
    with suppress(OSError):
        _remove(path)
