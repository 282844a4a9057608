"""What the fuzzers share: running cases, telling a crash from a refusal, saving crashes, the command line.

A case is a crash when anything but a NybbleError comes out, when it takes longer than
``--seconds-per-case``, or when it allocates more than the fuzzer allows. Crashes are saved in
fuzz/crashes with a number; ``--replay FILE`` reads one again. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CRASHES = Path(__file__).resolve().parent / "crashes"
ADDRESS_SPACE = 4 << 30  # where the system has a limit for it
CHUNK = 20_000  # cases that a process is given at a time


class Crash(Exception):
    """What was wrong with a case; the message is its report."""


@dataclass
class Fuzzer:
    """One format's fuzzer; its functions stand in a module of their own, which processes import."""

    name: str
    """Also the ending of its files."""
    load_seeds: Callable[[], list[Any]]
    damage: Callable[[random.Random, list[Any]], bytes]
    """A damaged file made of the seeds."""
    look: Callable[[bytes], bool]
    """Reads a file and looks at everything in it; whether it was accepted. Raises only what is a crash."""
    memory_limit: Callable[[int], int]
    """Bytes that a case may allocate, by the file's size."""
    seconds: float = 5.0
    crashes: Path = CRASHES

    def check(self, data: bytes, measure: bool, seconds: float) -> bool:
        """One case. Raises Crash."""
        if measure:
            tracemalloc.start()
        start = time.perf_counter()
        try:
            accepted = self.look(data)
            peak = tracemalloc.get_traced_memory()[1] if measure else 0
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Crash(traceback.format_exc()) from None
        finally:
            if measure:
                tracemalloc.stop()
        taken = time.perf_counter() - start
        if taken > seconds:
            raise Crash(f"took {taken:.1f} s")
        if peak > self.memory_limit(len(data)):
            raise Crash(f"allocated {peak} bytes for a file of {len(data)}")
        return accepted

    def fuzz(
        self, cases: int, seed: int, first: int = 0, measure_every: int = 50, seconds: float | None = None
    ) -> dict[str, int]:
        """Runs cases ``first`` to ``first + cases - 1``; counts of accepted, refused and crashed ones."""
        seconds = self.seconds if seconds is None else seconds
        seeds = self.load_seeds()
        for item in seeds:  # also makes the caches, which are no case's memory
            self.look(item if isinstance(item, bytes) else item.data)
        counts = {"accepted": 0, "refused": 0, "crashed": 0}
        for case in range(first, first + cases):
            data = self.damage(random.Random(f"{seed}:{case}"), seeds)
            try:
                accepted = self.check(data, case % measure_every == 0, seconds)
                counts["accepted" if accepted else "refused"] += 1
            except Crash as crash:
                counts["crashed"] += 1
                self.crashes.mkdir(parents=True, exist_ok=True)
                path = self.crashes / f"{self.name}-{seed}-{case}.{self.name}"
                path.write_bytes(data)
                print(f"{path}: {crash}", file=sys.stderr, flush=True)
        return counts

    def main(self, description: str | None, cases: int) -> int:
        """The command line; ``cases`` is the default."""
        parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
        parser.add_argument("--cases", type=int, default=cases)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--processes", type=int, default=1)
        parser.add_argument(
            "--measure-every", type=int, default=50, help="measure memory in one case of so many"
        )
        parser.add_argument("--seconds-per-case", type=float, default=self.seconds)
        parser.add_argument("--replay", type=Path, help="read one file, with its traceback")
        options = parser.parse_args()
        if options.replay:
            print("accepted" if self.look(options.replay.read_bytes()) else "refused")
            return 0
        start = time.perf_counter()
        jobs = [
            (
                self,
                min(CHUNK, options.cases - first),
                options.seed,
                first,
                options.measure_every,
                options.seconds_per_case,
            )
            for first in range(0, options.cases, CHUNK)
        ]
        total = {"accepted": 0, "refused": 0, "crashed": 0}
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for counts in pool.imap_unordered(_work, jobs):
                for key, count in counts.items():
                    total[key] += count
                done = sum(total.values())
                rate = done / (time.perf_counter() - start)
                print(f"{done} cases, {rate:.0f} a second: {total}", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        print(f"{options.cases} cases in {seconds:.0f} s ({options.cases / seconds:.0f} a second): {total}")
        return 1 if total["crashed"] else 0


def _work(job: tuple[Fuzzer, int, int, int, int, float]) -> dict[str, int]:
    _limit_memory()
    fuzzer, *arguments = job
    return fuzzer.fuzz(*arguments)


def _limit_memory() -> None:
    """Makes a runaway allocation fail instead of taking the machine, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
