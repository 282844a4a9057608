"""The native quantizers next to their description in NumPy: the same values, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.checkpoint.encodings import ENCODINGS
from nybble.quantize.blocks import BLOCK_TYPES, quantize_blocks
from nybble.quantize.blocks_reference_types import REFERENCES, reference
from support.quantizer_matrices import importance_of, matrix


def values_of(kind: str) -> np.ndarray:
    if kind == "odd":
        values = matrix("tails")[:6, :256].copy()
        values[0] = 0
        values[1] = 0.25
        values[2, 1:] = 0
        values[3] = np.abs(values[3])
        values[4] = -np.abs(values[4])
        values[5, ::2] = 0
        return values
    return matrix(kind)[:4, :256]


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("kind", ["normal", "tails", "shifted", "odd"])
@pytest.mark.parametrize("weighed", [False, True])
def test_native_equals_the_description(name: str, kind: str, weighed: bool) -> None:
    values = values_of(kind)
    importance = importance_of(values) if weighed else None
    if importance is not None:
        importance[:40] = 0
    native = ENCODINGS[name].dequantize(quantize_blocks(values, name, importance=importance))
    np.testing.assert_array_equal(native.reshape(values.shape), reference(values, name, importance))


def test_every_type_is_described() -> None:
    assert set(REFERENCES) == set(BLOCK_TYPES)
