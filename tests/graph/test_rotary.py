"""Rotary frequencies: what each kind of scaling promises, without an oracle; and bad constants.

That the values are those of transformers is tested in ``tests/models/test_parity.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.config import RopeConfig
from nybble.errors import FormatError
from nybble.graph import rotary_frequencies
from nybble.graph.rotary import is_long

PLAIN = RopeConfig(theta=10000.0, rotary_dim=8)
LONG = replace(
    PLAIN,
    kind="longrope",
    factor=32.0,
    original_max_position_embeddings=4096,
    short_factor=(1.0, 1.0, 1.0, 2.0),
    long_factor=(1.0, 4.0, 8.0, 16.0),
)


def test_default() -> None:
    frequencies, factor = rotary_frequencies(PLAIN, 1)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert factor == 1.0


def test_frequency_factors_divide() -> None:
    frequencies, _ = rotary_frequencies(replace(PLAIN, frequency_factors=(1.0, 2.0, 4.0, 8.0)), 1)
    np.testing.assert_allclose(frequencies, [1, 0.05, 0.0025, 0.000125], rtol=1e-6)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    rope = replace(PLAIN, kind="llama3", factor=8.0, original_max_position_embeddings=256)
    frequencies, _ = rotary_frequencies(rope, 1)
    # Turns in 256 positions: 40.7 (kept), 4.07 (kept), 0.407 and 0.0407 (fewer than 1: stretched).
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01 / 8, 0.001 / 8], rtol=1e-6)


def test_dynamic_grows_only_beyond_the_trained_length() -> None:
    rope = replace(PLAIN, kind="dynamic", factor=2.0, original_max_position_embeddings=100)
    np.testing.assert_array_equal(rotary_frequencies(rope, 100)[0], rotary_frequencies(PLAIN, 1)[0])
    theta = 10000.0 * (2.0 * 200 / 100 - 1) ** (8 / 6)
    np.testing.assert_allclose(rotary_frequencies(rope, 200)[0][1], theta ** (-2 / 8), rtol=1e-6)


@pytest.mark.parametrize(("length", "long"), [(1, False), (4096, False), (4097, True), (131072, True)])
def test_longrope_chooses_by_the_length_of_the_sequence(length: int, long: bool) -> None:
    frequencies, factor = rotary_frequencies(LONG, length)
    divisors = LONG.long_factor if long else LONG.short_factor
    np.testing.assert_allclose(frequencies, np.array([1, 0.1, 0.01, 0.001]) / divisors, rtol=1e-6)
    # sqrt(1 + ln 32 / ln 4096): the value of Phi-3-mini-128k, at every length.
    assert factor == pytest.approx(1.1902380714238083)
    assert is_long(LONG, length) == long


def test_attention_factor_of_the_file_wins() -> None:
    assert rotary_frequencies(replace(LONG, attention_factor=1.5), 1)[1] == 1.5
    yarn = replace(PLAIN, kind="yarn", factor=4.0, original_max_position_embeddings=64)
    assert rotary_frequencies(yarn, 1)[1] == pytest.approx(0.1 * math.log(4) + 1)
    assert rotary_frequencies(replace(yarn, attention_factor=2.0), 1)[1] == 2.0


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (replace(LONG, short_factor=(1.0,)), "short_factor has 1 values; 4 are needed"),
        (replace(LONG, original_max_position_embeddings=None), "longrope scaling needs original"),
        (replace(PLAIN, kind="yarn", theta=1.0, original_max_position_embeddings=9), "theta above 1"),
        (replace(PLAIN, frequency_factors=(1.0,)), "frequency_factors has 1 values"),
        (
            replace(PLAIN, kind="llama3", original_max_position_embeddings=9, low_freq_factor=4.0),
            "low_freq_factor 4.0 must be above 0 and below high_freq_factor 4.0",
        ),
    ],
)
def test_bad_constants(rope: RopeConfig, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        rotary_frequencies(rope, 1)
