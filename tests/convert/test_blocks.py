"""Blocks rebuilt from their values and what is kept beside them, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.checkpoint.encodings import ENCODINGS
from nybble.convert.blocks import REBUILDABLE, header_bytes, headers_of, kept, rebuilt
from support.random_checkpoints import encoded


@pytest.mark.parametrize("name", sorted(REBUILDABLE))
def test_any_block_comes_back(name: str) -> None:
    """Random codes and random scales: also such as no quantizer makes."""
    row = ENCODINGS[name]
    random = np.random.default_rng(3)
    data = random.integers(0, 256, (300, row.block_bytes), np.uint8)
    data[:, :] = np.where(random.random((300, 1)) < 0.5, data, encoded_blocks(name, 300))
    flat = data.reshape(-1)
    with np.errstate(all="ignore"):
        values = row.dequantize(flat)
        record = kept(row, values, flat)
        assert np.array_equal(rebuilt(row, values, record), flat)
    assert record.nbytes <= flat.size * 1.4


def encoded_blocks(name: str, count: int) -> np.ndarray:
    row = ENCODINGS[name]
    shape = (count, row.block_size)
    return encoded(np.random.default_rng(4), name, shape, 0.02).reshape(count, row.block_bytes)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_what_the_quantizer_gives_needs_no_record(name: str) -> None:
    row = ENCODINGS[name]
    data = encoded(np.random.default_rng(0), name, (20, 256), 0.02)
    record = kept(row, row.dequantize(data), data)
    assert record.headers is None and record.nbytes == 0


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_k_types_need_their_headers_alone(name: str) -> None:
    row = ENCODINGS[name]
    data = encoded_blocks(name, 200)
    if name == "q6_k":
        data[:, 192:208] |= 1  # no scale of 0, which would hide its codes
    else:
        data[:, 4:16] |= 0x11
    flat = data.reshape(-1)
    record = kept(row, row.dequantize(flat), flat)
    assert record.headers is not None
    assert np.array_equal(record.headers, headers_of(row, flat))
    assert record.headers.shape == (200, header_bytes(row))
    assert record.places.size == 0


def test_changed_values_give_other_blocks() -> None:
    row = ENCODINGS["q6_k"]
    flat = encoded_blocks("q6_k", 8).reshape(-1)
    values = row.dequantize(flat)
    record = kept(row, values, flat)
    values[5] += 0.01
    assert not np.array_equal(row.dequantize(rebuilt(row, values, record)), values)
