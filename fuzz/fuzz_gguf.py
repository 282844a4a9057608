"""A mutational fuzzer of the GGUF reader: damaged files must give a NybbleError or a sound result.

    python fuzz/fuzz_gguf.py --cases 1000000 --processes 1 --seed 0

Each case takes a seed file of fuzz/corpus/gguf, damages it (bit flips, boundary values in counts,
lengths, types and offsets, truncation, insertion, doubled and moved ranges, splices of two files),
reads it from memory and looks at everything in it. A case is a crash when anything but a
NybbleError comes out, when it takes longer than ``--seconds-per-case``, or when it allocates more
than the file's size times a constant plus a constant. Crashes are saved in fuzz/crashes with a
number; ``--replay FILE`` reads one again. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import struct
import sys
import time
import traceback
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from nybble.errors import NybbleError  # noqa: E402
from nybble.formats.gguf.reader import GGUFFile  # noqa: E402
from nybble.formats.gguf.values import NestedArray, StringArray  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus" / "gguf"
CRASHES = ROOT / "fuzz" / "crashes"

MEMORY_FACTOR = 40  # a key of 20 bytes becomes some Python objects
MEMORY_CONSTANT = 128 << 10  # messages, and the codebooks and caches made on first use
ADDRESS_SPACE = 4 << 30  # where the system has a limit for it

BOUNDARIES = sorted(
    {
        0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 255, 256, 65535, 65536,
        2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**56, 2**60, 2**61, 2**62,
        2**63 - 1, 2**63, 2**63 + 1, 2**64 - 33, 2**64 - 8, 2**64 - 2, 2**64 - 1,
    }
)  # fmt: skip


class Seed:
    """A seed file and where its counts, lengths, types, numbers, dimensions and offsets are."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[4] in (2, 3) else ">"
        self.fields: list[tuple[int, int]] = [(4, 4), (8, 8), (16, 8)]  # offset, size
        self.arrays: list[int] = []  # offsets of arrays: element type, count, elements
        self.at = 24
        tensors, keys = struct.unpack_from(self.order + "QQ", data, 8)
        for _ in range(keys):
            self.string()
            self.value(self.number(4))
        for _ in range(tensors):
            self.string()
            for _ in range(self.number(4)):
                self.number(8)
            self.number(4)
            self.number(8)

    def number(self, size: int) -> int:
        self.fields.append((self.at, size))
        self.at += size
        return int(struct.unpack_from(self.order + ("I" if size == 4 else "Q"), self.data, self.at - size)[0])

    def string(self) -> None:
        length = self.number(8)
        self.at += length

    def value(self, kind: int) -> None:
        if kind == 8:
            self.string()
        elif kind == 9:
            self.arrays.append(self.at)
            element, count = self.number(4), self.number(8)
            for _ in range(count):
                self.value(element)
        elif kind in (0, 1, 2, 3, 7):
            self.at += 2 if kind in (2, 3) else 1
        else:
            self.number(8 if kind >= 10 else 4)


def damage(rng: random.Random, seeds: list[Seed]) -> bytes:
    """A damaged file: one to six mutations of a seed."""
    seed = seeds[rng.randrange(len(seeds))]
    data = bytearray(seed.data)
    for _ in range(1 + int(rng.random() ** 2 * 6)):
        MUTATIONS[rng.randrange(len(MUTATIONS))](rng, data, seed, seeds)
    return bytes(data)


def set_field(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    at, size = seed.fields[rng.randrange(len(seed.fields))]
    if at + size > len(data):
        return
    letter = seed.order + ("I" if size == 4 else "Q")
    old = struct.unpack_from(letter, data, at)[0]
    choice = rng.randrange(4)
    if choice == 0:
        new = old + rng.choice((-32, -8, -1, 1, 8, 32))
    elif choice == 1:
        new = len(data) - at + rng.randint(-16, 16)
    elif choice == 2:
        new = rng.randrange(64)
    else:
        new = rng.choice(BOUNDARIES)
    struct.pack_into(letter, data, at, new % (1 << 8 * size))


def flip_bits(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    if data:
        data[rng.randrange(min(len(data), seed.at + 64))] = rng.choice(
            (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
        )


def set_number(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    size = rng.choice((2, 4, 8))
    if len(data) >= size:
        at = rng.randrange(len(data) - size + 1)
        data[at : at + size] = (rng.choice(BOUNDARIES) % (1 << 8 * size)).to_bytes(
            size, rng.choice(("little", "big"))
        )


def truncate(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5 and seed.fields:
        at = min(len(data), seed.fields[rng.randrange(len(seed.fields))][0] + rng.randrange(9))
    del data[at:]


def insert(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 33)))


def delete(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 4, 8, 12, 33))]


def double(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    if data:
        start = rng.randrange(len(data))
        piece = data[start : start + rng.randrange(1, 200)]
        at = start if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            data[at:at] = piece
        else:
            data[at : at + len(piece)] = piece


def splice(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    other = seeds[rng.randrange(len(seeds))].data
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other)) :]


def deepen(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    """Puts an array into many arrays of one element."""
    if seed.arrays:
        at = seed.arrays[rng.randrange(len(seed.arrays))]
        data[at:at] = struct.pack(seed.order + "IQ", 9, 1) * rng.choice((1, 6, 7, 8, 9, 1500))


MUTATIONS = (
    set_field, set_field, set_field, set_field, flip_bits, set_byte, set_number, truncate, insert, delete,
    double, splice, deepen,
)  # fmt: skip


def look(data: bytes) -> bool:
    """Reads a file and looks at everything in it; whether it was accepted.

    Raises:
        Exception: anything but a NybbleError is a crash.
    """
    try:
        file = GGUFFile.from_bytes(data)
    except NybbleError as error:
        message = str(error)
        assert message.startswith("<memory>: at offset "), message
        return False
    for value in file.metadata.values():
        look_at(value)
    end = 0
    for info in sorted(file.infos.values(), key=lambda info: info.offset):
        assert info.offset >= end and info.offset % file.alignment == 0, info
        end = info.offset + info.nbytes
    assert end <= len(data)
    for name, info in file.infos.items():
        try:
            tensor = file.tensors[name]
        except NybbleError:
            continue
        assert tensor.nbytes == info.nbytes and tensor.shape == info.shape
    file.close()
    return True


def look_at(value: object) -> None:
    try:
        if isinstance(value, StringArray):
            assert all(isinstance(item, str) for item in value)
        elif isinstance(value, NestedArray):
            for item in value:
                look_at(item)
    except NybbleError:  # strings are only decoded when they are looked at
        pass


class Crash(Exception):
    """What was wrong with a case; the message is its report."""


def check(data: bytes, measure: bool, seconds: float) -> bool:
    """One case. Raises Crash."""
    if measure:
        tracemalloc.start()
    start = time.perf_counter()
    try:
        accepted = look(data)
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
    if peak > MEMORY_FACTOR * len(data) + MEMORY_CONSTANT:
        raise Crash(f"allocated {peak} bytes for a file of {len(data)}")
    return accepted


def limit_memory() -> None:
    """Makes a runaway allocation fail instead of taking the machine, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def load_seeds() -> list[Seed]:
    return [Seed(path.read_bytes()) for path in sorted(CORPUS.glob("*.gguf"))]


def fuzz(
    cases: int, seed: int, first: int = 0, measure_every: int = 50, seconds: float = 5.0
) -> dict[str, int]:
    """Runs cases ``first`` to ``first + cases - 1``; counts of accepted, refused and crashed ones."""
    seeds = load_seeds()
    for item in seeds:
        check(item.data, False, seconds)  # also makes the caches, which are no case's memory
    counts = {"accepted": 0, "refused": 0, "crashed": 0}
    for case in range(first, first + cases):
        data = damage(random.Random(f"{seed}:{case}"), seeds)
        try:
            accepted = check(data, case % measure_every == 0, seconds)
            counts["accepted" if accepted else "refused"] += 1
        except Crash as crash:
            counts["crashed"] += 1
            CRASHES.mkdir(parents=True, exist_ok=True)
            path = CRASHES / f"gguf-{seed}-{case}.gguf"
            path.write_bytes(data)
            print(f"{path}: {crash}", file=sys.stderr, flush=True)
    return counts


def worker(arguments: tuple[int, int, int, int, float]) -> dict[str, int]:
    limit_memory()
    return fuzz(*arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--measure-every", type=int, default=50, help="measure memory in one case of so many")
    parser.add_argument("--seconds-per-case", type=float, default=5.0)
    parser.add_argument("--replay", type=Path, help="read one file, with its traceback")
    options = parser.parse_args()
    if options.replay:
        print("accepted" if look(options.replay.read_bytes()) else "refused")
        return 0
    start = time.perf_counter()
    chunk = 20_000
    jobs = [
        (
            min(chunk, options.cases - first),
            options.seed,
            first,
            options.measure_every,
            options.seconds_per_case,
        )
        for first in range(0, options.cases, chunk)
    ]
    total = {"accepted": 0, "refused": 0, "crashed": 0}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for counts in pool.imap_unordered(worker, jobs):
            for key, count in counts.items():
                total[key] += count
            done = sum(total.values())
            rate = done / (time.perf_counter() - start)
            print(f"{done} cases, {rate:.0f} a second: {total}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(f"{options.cases} cases in {seconds:.0f} s ({options.cases / seconds:.0f} a second): {total}")
    return 1 if total["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main())
