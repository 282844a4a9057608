"""A mutational fuzzer of the safetensors reader: damaged files give a NybbleError or a sound result.

    python fuzz/fuzz_safetensors.py --cases 1000000 --seed 0

Each case takes a seed file of fuzz/corpus/safetensors and damages its bytes, or the numbers, words and
nesting of its header (whose length is put right half of the time). The rest is as in fuzz_gguf.py.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "fuzz")]

from fuzz_gguf import (  # noqa: E402
    BOUNDARIES,
    Crash,
    delete,
    double,
    flip_bits,
    insert,
    limit_memory,
    set_byte,
    set_number,
    splice,
    truncate,
)

from nybble.errors import NybbleError, UnsupportedError  # noqa: E402
from nybble.formats.safetensors.reader import SafetensorsFile  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus" / "safetensors"
CRASHES = ROOT / "fuzz" / "crashes"
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
    """A seed file, with what the mutations of fuzz_gguf ask for."""

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


def load_seeds() -> list[Seed]:
    return [Seed(path.read_bytes()) for path in sorted(CORPUS.glob("*.safetensors"))]


def fuzz(cases: int, seed: int, measure_every: int = 50, seconds: float = 5.0) -> dict[str, int]:
    """Runs cases; counts of accepted, refused and crashed ones."""
    seeds = load_seeds()
    for item in seeds:
        check(item.data, False, seconds)  # also makes the caches, which are no case's memory
    counts = {"accepted": 0, "refused": 0, "crashed": 0}
    for case in range(cases):
        data = damage(random.Random(f"{seed}:{case}"), seeds)
        try:
            accepted = check(data, case % measure_every == 0, seconds)
            counts["accepted" if accepted else "refused"] += 1
        except Crash as crash:
            counts["crashed"] += 1
            CRASHES.mkdir(parents=True, exist_ok=True)
            path = CRASHES / f"safetensors-{seed}-{case}.safetensors"
            path.write_bytes(data)
            print(f"{path}: {crash}", file=sys.stderr, flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-every", type=int, default=50, help="measure memory in one case of so many")
    parser.add_argument("--seconds-per-case", type=float, default=5.0)
    parser.add_argument("--replay", type=Path, help="read one file, with its traceback")
    options = parser.parse_args()
    if options.replay:
        print("accepted" if look(options.replay.read_bytes()) else "refused")
        return 0
    limit_memory()
    start = time.perf_counter()
    counts = fuzz(options.cases, options.seed, options.measure_every, options.seconds_per_case)
    seconds = time.perf_counter() - start
    print(f"{options.cases} cases in {seconds:.0f} s ({options.cases / seconds:.0f} a second): {counts}")
    return 1 if counts["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main())
