"""Rows of a matrix shared out among threads: the native core computes without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from nybble import _core

_PARTS_A_THREAD = 4  # so that a thread that the system slows down takes fewer
_LEAST_ROWS = 16


def over_rows(work: Callable[[int, int], None], rows: int, threads: int | None = None) -> None:
    """Calls ``work(start, stop)`` for ranges that make up 0 .. rows, several at a time.

    Args:
        work: what to do with rows start .. stop; calls must not touch each other's rows.
        rows: how many there are.
        threads: at most; None: the cores that this process may use.

    Raises:
        ValueError: ``threads`` is below 1.
        Exception: what ``work`` raised first.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least 1 is needed")
    count = _core.default_threads() if threads is None else threads
    step = max(_LEAST_ROWS, -(-rows // (_PARTS_A_THREAD * count)))
    starts = range(0, rows, step)
    if count == 1 or len(starts) <= 1:
        for start in starts:
            work(start, min(start + step, rows))
        return
    futures = [_pool(count).submit(work, start, min(start + step, rows)) for start in starts]
    problems = [problem for future in futures if (problem := future.exception()) is not None]
    if problems:
        raise problems[0]


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "nybble-quantize")
