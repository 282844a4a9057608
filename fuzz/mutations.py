"""Damage to bytes that suits any binary format.

A seed offers ``data``, ``fields`` (offset and size of the numbers in it) and ``at`` (where its head ends).
"""

from __future__ import annotations

import random
from typing import Protocol

BOUNDARIES = sorted(
    {
        0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 255, 256, 65535, 65536,
        2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**56, 2**60, 2**61, 2**62,
        2**63 - 1, 2**63, 2**63 + 1, 2**64 - 33, 2**64 - 8, 2**64 - 2, 2**64 - 1,
    }
)  # fmt: skip


class Seed(Protocol):
    """A file to damage."""

    data: bytes
    fields: list[tuple[int, int]]
    at: int


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
