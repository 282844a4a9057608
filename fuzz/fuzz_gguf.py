"""A mutational fuzzer of the GGUF reader: damaged files must give a NybbleError or a sound result.

    python fuzz/fuzz_gguf.py --cases 1000000 --processes 1 --seed 0

Each case takes a seed file of fuzz/corpus/gguf, damages it (bit flips, boundary values in counts,
lengths, types and offsets, truncation, insertion, doubled and moved ranges, splices of two files),
reads it from memory and looks at everything in it. It may allocate the file's size times a constant
plus a constant; see harness.py for what a crash is.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "fuzz")]

from harness import Fuzzer  # noqa: E402
from mutations import (  # noqa: E402
    BOUNDARIES,
    delete,
    double,
    flip_bits,
    insert,
    set_byte,
    set_number,
    splice,
    truncate,
)

from nybble.errors import NybbleError  # noqa: E402
from nybble.formats.gguf.reader import GGUFFile  # noqa: E402
from nybble.formats.gguf.values import NestedArray, StringArray  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus" / "gguf"

MEMORY_FACTOR = 40  # a key of 20 bytes becomes some Python objects
MEMORY_CONSTANT = 128 << 10  # messages, and the codebooks and caches made on first use


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


def load_seeds() -> list[Seed]:
    return [Seed(path.read_bytes()) for path in sorted(CORPUS.glob("*.gguf"))]


def memory_limit(size: int) -> int:
    return MEMORY_FACTOR * size + MEMORY_CONSTANT


FUZZER = Fuzzer("gguf", load_seeds, damage, look, memory_limit)

if __name__ == "__main__":
    sys.exit(FUZZER.main(__doc__, cases=100_000))
