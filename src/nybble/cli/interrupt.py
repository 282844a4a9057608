"""Ctrl-C while a model computes: the work runs in a thread, so that the main thread can notice.

Python delivers signals to the main thread between bytecodes; inside a long call of the native
core it would be deaf until the call returns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1  # a wait without a limit cannot be interrupted on Windows


class _End:
    """What the thread sends last: its failure, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def interruptible(items: Iterable[T], cancel: Callable[[], None]) -> Generator[T, None, None]:
    """The same items, computed in another thread.

    When the consumer stops early, Ctrl-C included, ``cancel`` is called, at most one more item is
    computed, and the thread has ended before this iterator does.
    """
    results: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                results.put(item)
                if stop.is_set():
                    break
            error: BaseException | None = None
        except BaseException as failure:
            error = failure
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        results.put(_End(error))

    thread = threading.Thread(target=work, name="nybble-generate", daemon=True)
    thread.start()
    ended = False
    try:
        while True:
            try:
                item = results.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                ended = True
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        while not ended and thread.is_alive():
            # Again and again: a cancel between two calls of the core reaches neither.
            cancel()
            thread.join(_POLL_SECONDS)
