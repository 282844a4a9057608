"""How fast a session prefills and decodes, at given lengths and depths.

*Prefill* computes a prompt in one call and asks for the last row of logits; *decode* computes one
token a call. *Depth* is how many tokens the cache holds before the measured part begins; filling
it is not measured. Tokens are random: what they say does not change the work of dense models, and
nothing is sampled, so the figures are those of the device alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nybble.devices.base import BatchItem, Session
from nybble.devices.base import Sequence as TokenSequence
from nybble.errors import ContextLengthError

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Measurement:
    """Times of one phase at one length and depth, one entry a repetition."""

    phase: Phase
    tokens: int
    """Tokens computed in each repetition."""
    depth: int
    """Tokens in the cache before them."""
    seconds: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens a second of each repetition."""
        return tuple(self.tokens / seconds for seconds in self.seconds)

    @property
    def median(self) -> float:
        """Median of the rates, tokens a second."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest repetition, tokens a second."""
        return min(self.rates), max(self.rates)


def measure(
    session: Session,
    *,
    prefill: Sequence[int] = (512,),
    decode: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Measurement]:
    """Measure each length at each depth, after one repetition that is not counted.

    The phases' repetitions alternate, so that a neighbour's load that comes and goes hits all of
    them alike; a depth's measurements are yielded when all its repetitions are done.

    Args:
        session: what to measure; only new sequences are used.
        prefill: prompt lengths, tokens; may be empty.
        decode: answer lengths, tokens; may be empty.
        depths: tokens in the cache beforehand.
        repetitions: how often each is timed, at least 1.
        seed: of the random tokens.
        clock: seconds since some moment.

    Raises:
        ContextLengthError: depth and length together exceed the session's context length.
        ValueError: a length or ``repetitions`` is below 1, or a depth below 0.
    """
    _check(session, prefill, decode, depths, repetitions)
    random = np.random.default_rng(seed)
    for depth in depths:
        base = session.new_sequence()
        try:
            if depth:
                session.forward([BatchItem(base, _tokens(random, session, depth), "none")])
            cases: list[tuple[Phase, int, list[float]]] = []
            cases += [("prefill", tokens, []) for tokens in prefill]
            cases += [("decode", tokens, []) for tokens in decode]
            for repetition in range(repetitions + 1):
                for phase, tokens, seconds in cases:
                    new = _tokens(random, session, tokens)
                    elapsed = _time(session, base, phase, new, clock)
                    if repetition:
                        seconds.append(elapsed)
        finally:
            base.close()
        for phase, tokens, seconds in cases:
            yield Measurement(phase, tokens, depth, tuple(seconds))


def peak_memory() -> int | None:
    """Largest resident size of this process so far, bytes; None where the system does not say."""
    if sys.platform == "win32":
        return _windows_peak_memory()
    if sys.platform == "linux":
        # Not ru_maxrss: that one begins with the size of the process that started this one.
        with open("/proc/self/status") as status:
            peaks = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, this one included; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _check(
    session: Session, prefill: Sequence[int], decode: Sequence[int], depths: Sequence[int], repetitions: int
) -> None:
    lengths = [*prefill, *decode]
    if not lengths:
        raise ValueError("nothing to measure: give a prefill or a decode length")
    if min(lengths) < 1 or repetitions < 1 or not depths or min(depths) < 0:
        raise ValueError("lengths and repetitions must be at least 1, depths at least 0")
    needed = max(lengths) + max(depths)
    if needed > session.context_length:
        raise ContextLengthError(
            f"depth {max(depths)} and {max(lengths)} tokens need a context of {needed} tokens, "
            f"but the session allows {session.context_length}"
        )


def _tokens(random: np.random.Generator, session: Session, count: int) -> list[int]:
    return [int(token) for token in random.integers(0, session.vocab_size, count)]


def _time(
    session: Session, base: TokenSequence, phase: Phase, tokens: list[int], clock: Callable[[], float]
) -> float:
    # A fork, because a sliding window may have freed pages that truncate() would need back.
    sequence = base.fork()
    try:
        start = clock()
        if phase == "prefill":
            session.forward([BatchItem(sequence, tokens, "last")])
        else:
            for token in tokens:
                session.forward([BatchItem(sequence, [token], "last")])
        return clock() - start
    finally:
        sequence.close()


def _windows_peak_memory() -> int | None:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h."""

        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        )

    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - exists on Windows alone
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.K32GetProcessMemoryInfo.argtypes = (wintypes.HANDLE, ctypes.POINTER(Counters), wintypes.DWORD)
    counters = Counters(cb=ctypes.sizeof(Counters))
    if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return None
    return int(counters.PeakWorkingSetSize)
