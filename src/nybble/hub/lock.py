"""A lock between processes, held on an open file: the system drops it when its holder dies.

So there are no stale locks to clean up, and the lock file itself means nothing. It stays where it is:
deleting it would let two processes hold locks on two files of the same name.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nybble.errors import DownloadError, NybbleError

_POLL_SECONDS = 0.1
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


@contextmanager
def file_lock(
    path: Path, *, on_wait: Callable[[], None] | None = None, timeout: float | None = None
) -> Iterator[None]:
    """Hold the lock on `path` (made if absent) inside the `with` block.

    Args:
        path: the lock file.
        on_wait: called once if another process or thread holds the lock.
        timeout: seconds to wait at most; None waits for ever.

    Raises:
        DownloadError: the time is over, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = False
        while not _try_lock(descriptor, path):
            if not waiting and on_wait is not None:
                on_wait()
            waiting = True
            if deadline is not None and time.monotonic() >= deadline:
                raise DownloadError(f"another process still holds {path} after {timeout:g} s")
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            _unlock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise NybbleError(
            f"{path}: this file system has no locks ({error}); set NYBBLE_CACHE to a folder on a local disk"
        ) from error
    return True


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        with suppress(OSError):
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
