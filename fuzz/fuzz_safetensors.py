"""A mutational fuzzer of the safetensors reader: damaged files give a NybbleError or a sound result.

    python fuzz/fuzz_safetensors.py --cases 1000000 --seed 0

Each case takes a seed file of fuzz/corpus/safetensors and damages its bytes, or the numbers, words and
nesting of its header (whose length is put right half of the time); see harness.py for what a crash is.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
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

from nybble.errors import NybbleError, UnsupportedError  # noqa: E402
from nybble.formats.safetensors.reader import SafetensorsFile  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus" / "safetensors"
MEMORY_FACTOR = 40  # a key of ten bytes becomes some Python objects
MEMORY_CONSTANT = 256 << 10
_NUMBER = re.compile(rb"\d+")
_WORD = re.compile(rb'"[^"]*"')
_WORDS = (
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"BF16"', b'"F4"', b'"X"', b'""',
    b"null", b"true", b"-1", b"1e3", b"1.0", b"NaN", b"[]", b"{}", b'"\\ud800"', b"[0,0]", b"9" * 30,
    b"9" * 5000,
)  # fmt: skip


class Seed:
    """A seed file, with what the mutations ask for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<"
        self.fields = [(0, 8)]
        self.at = 8 + int.from_bytes(data[:8], "little")


def header_end(data: bytearray) -> int:
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))


def replace_match(rng: random.Random, data: bytearray, pattern: re.Pattern[bytes], new: Callable) -> None:
    found = list(pattern.finditer(bytes(data[8 : header_end(data)])))
    if found:
        match = found[rng.randrange(len(found))]
        data[8 + match.start() : 8 + match.end()] = new(match[0])


def set_length(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    if len(data) >= 8:
        right = len(data) - 8
        length = rng.choice((*BOUNDARIES, right, right + 1, right - 1, seed.at - 9, seed.at - 7, 100_000_001))
        data[:8] = (length % 2**64).to_bytes(8, "little")


def change_number(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    def new(old: bytes) -> bytes:
        value = int(old[:18])
        return str(
            rng.choice((value + 1, value - 1, 2 * value, rng.randrange(99), rng.choice(BOUNDARIES)))
        ).encode()

    replace_match(rng, data, _NUMBER, new)


def change_word(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    replace_match(rng, data, rng.choice((_WORD, _NUMBER)), lambda old: rng.choice(_WORDS))


def double_entry(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    """An entry of the header a second time, sometimes under another name."""
    text = bytes(data[8 : header_end(data)])
    match = re.search(rb'"[^"]*":\{[^}]*\}', text)
    if match:
        again = match[0] if rng.random() < 0.5 else match[0].replace(b'"', b'"x', 1)
        data[8 + match.end() : 8 + match.end()] = b"," + again


def deepen(rng: random.Random, data: bytearray, seed: Seed, seeds: list[Seed]) -> None:
    depth = rng.choice((1, 10, 900, 1100, 20000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    replace_match(rng, data, _NUMBER, lambda old: opening * depth + old + closing * depth)


MUTATIONS = (
    set_length, change_number, change_number, change_number, change_word, change_word, double_entry, deepen,
    flip_bits, set_byte, set_number, truncate, insert, delete, double, splice,
)  # fmt: skip


def damage(rng: random.Random, seeds: list[Seed]) -> bytes:
    """A damaged file: one to four mutations of a seed."""
    seed = seeds[rng.randrange(len(seeds))]
    data = bytearray(seed.data)
    end = header_end(data)
    tail = len(data) - end
    for _ in range(1 + int(rng.random() ** 2 * 4)):
        MUTATIONS[rng.randrange(len(MUTATIONS))](rng, data, seed, seeds)
    if rng.random() < 0.5 and len(data) >= 8 + tail:
        data[:8] = (len(data) - 8 - tail).to_bytes(8, "little")
    return bytes(data)


def look(data: bytes) -> bool:
    """Reads a file and looks at everything in it; whether it was accepted.

    Raises:
        Exception: anything but a NybbleError is a crash.
    """
    try:
        file = SafetensorsFile.from_bytes(data)
    except NybbleError as error:
        message = str(error)
        assert message.startswith("<memory>: ") and len(message) < 2000, message
        return False
    end = 8 + int.from_bytes(data[:8], "little")
    for name, info in file.infos.items():
        assert info.offset == end, info
        end += info.nbytes
        try:
            tensor = file.tensors[name]
        except UnsupportedError:
            continue
        assert tensor.data.nbytes == tensor.nbytes == info.nbytes and tensor.shape == info.shape
    assert end == len(data)
    return True


def load_seeds() -> list[Seed]:
    return [Seed(path.read_bytes()) for path in sorted(CORPUS.glob("*.safetensors"))]


def memory_limit(size: int) -> int:
    return MEMORY_FACTOR * size + MEMORY_CONSTANT


FUZZER = Fuzzer("safetensors", load_seeds, damage, look, memory_limit)

if __name__ == "__main__":
    sys.exit(FUZZER.main(__doc__, cases=100_000))
