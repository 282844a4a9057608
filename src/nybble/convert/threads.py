"""Work on pieces in several threads, results in the pieces' order: NumPy computes without the GIL."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

from nybble import _core

T = TypeVar("T")
R = TypeVar("R")

MAX_THREADS = 8


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``work`` of each item, in their order. At most two items a thread are under way.

    An exception of ``work`` comes out in its item's place, after those that were begun have ended.
    """
    waiting: deque[Future[R]] = deque()
    pool, threads = _pool()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@lru_cache(maxsize=1)
def _pool() -> tuple[ThreadPoolExecutor, int]:
    threads = min(_core.default_threads(), MAX_THREADS)
    return ThreadPoolExecutor(threads, "nybble-convert"), threads
