"""Codes in words: the layout, in whole numbers of any size, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.formats.huggingface.quantized import packing


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_codes_follow_each_other_from_the_lowest_bit(bits: int, count: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    words = packing.pack_rows(codes, bits)
    assert words.shape == (rows, packing.words_for(count, bits))
    for row, packed in zip(codes, words, strict=True):
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(packed))] == packed.tolist()
    np.testing.assert_array_equal(packing.unpack_rows(words, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_chunks_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(1).integers(0, 2**bits, (33, 96), dtype=np.uint8)
    words = packing.pack_rows(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 200)
    np.testing.assert_array_equal(packing.pack_rows(codes, bits), words)
    np.testing.assert_array_equal(packing.unpack_rows(words, bits, 96), codes)
