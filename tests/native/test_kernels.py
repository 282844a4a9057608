"""Weight kernels of every instruction set here against the NumPy definitions of the encodings.

Shapes, groupings and memory bounds are tested without Python, in native/tests/test_kernels.cpp.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from nybble.checkpoint.encodings import ENCODINGS, encoding

_core = pytest.importorskip("nybble._core")

LEVELS = [name for name, why_not in _core.isa_report().items() if not why_not]

# Byte offsets of the float16 scales in a block.
SCALES = {
    "q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2),
    "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,),
}  # fmt: skip
NO_HALF_SCALE = (
    "f32", "bf16", "q8_k", "iq1_m", "mxfp4", "nvfp4", "int4_g32_f32", "int4_g32_f32_z", "int8_g32_f32",
    "int4_g32_f32_m", "int8_g32_f32_m",
)  # fmt: skip
WITH_MINIMUM = ("int4_g32_f32_m", "int8_g32_f32_m")
AFFINE = ("int4_g32_f32", "int4_g32_f16_z", "int4_g32_f32_z", "int8_g32_f32", *WITH_MINIMUM)
ZERO_POINTS = {"int4_g32_f16_z": 2, "int4_g32_f32_z": 4}
INTEGER_DOT = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq4_nl", "iq4_xs", "mxfp4", *AFFINE,
)  # fmt: skip


def _native(name: str) -> bool:
    try:
        _core.encoding_kernels(name)
    except (ValueError, RuntimeError):
        return False
    return True


NAMES = [name for name in (*ENCODINGS, *AFFINE) if _native(name)]


def random_blocks(name: str, count: int, moderate: bool) -> npt.NDArray[np.uint8]:
    """Random bytes (count, block_bytes); `moderate` makes scales finite, about 0.01 to 1."""
    rng = np.random.default_rng(len(name) + count)
    blocks = rng.integers(0, 256, (count, encoding(name).block_bytes), dtype=np.uint8)
    if name in ZERO_POINTS:
        blocks[:, ZERO_POINTS[name]] %= 17  # the kernels' limit, checked when a model is loaded
    if name == "int8_g32_f32_m":
        blocks[:, 8:] &= 127  # the same
    if not moderate:
        return blocks
    if name == "f32":
        return rng.standard_normal((count, 1)).astype("<f4").view(np.uint8)
    if name == "bf16":
        blocks[:, 1] = 0x3E
    elif name == "q8_k":
        blocks[:, :4] = np.float32(0.01).reshape(1).view(np.uint8)
    elif name in AFFINE and name in NO_HALF_SCALE:
        blocks[:, :4] = rng.uniform(0.01, 1.0, (count, 1)).astype("<f4").view(np.uint8)
        if name in WITH_MINIMUM:
            blocks[:, 4:8] = rng.uniform(-9.0, 9.0, (count, 1)).astype("<f4").view(np.uint8)
    elif name == "mxfp4":
        blocks[:, 0] = rng.integers(115, 125, count)
    elif name == "nvfp4":
        blocks[:, :4] &= 0x3F
    elif name == "iq1_m":
        blocks[:, 55] = (blocks[:, 55] & 0x0F) | 0x20
    for at in () if name in NO_HALF_SCALE else SCALES.get(name, (0,)):
        scale = rng.uniform(0.01, 1.0, (count, 1)).astype("<f2")
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even (finite values)."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_the_native_core_knows_the_encodings() -> None:
    assert {"f32", "f16", "bf16", "nvfp4", "q1_0", *INTEGER_DOT} <= set(NAMES)
    with pytest.raises(ValueError, match="q9_9"):
        _core.dequantize("q9_9", np.zeros(18, np.uint8), 32)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_dequantize_equals_the_definition_to_the_last_bit(name: str, level: str) -> None:
    row = encoding(name)
    for moderate in (True, False):
        blocks = random_blocks(name, 37, moderate)
        with np.errstate(all="ignore"):
            expected = row.dequantize(blocks.reshape(-1)).astype(np.float32)
        got = _core.dequantize(name, blocks.reshape(-1), expected.size, level)
        same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
        assert same.all()
        rounded = _core.dequantize_bf16(name, blocks.reshape(-1), expected.size, level)
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(rounded[numbers], bfloat16_bits(expected[numbers]))
        assert ((rounded[~numbers] & 0x7FFF) > 0x7F80).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_products_against_numpy(name: str, level: str) -> None:
    row = encoding(name)
    columns = 512 + (96 if row.block_size <= 32 else 256)
    rows, m = 7, 5
    blocks = random_blocks(name, rows * columns // row.block_size, True)
    weight = row.dequantize(blocks.reshape(-1)).astype(np.float64).reshape(rows, columns)
    # Multiples of 1/64 up to 127/64, the largest in every block: exact as int8 with a float scale.
    whole = np.random.default_rng(1).integers(-127, 128, (m, columns))
    whole[:, ::32] = 127
    x = (whole / 64.0).astype(np.float32)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T
    for path in ("f32", "int8"):
        got = _core.linear(name, blocks.reshape(-1), rows, x, path, level)
        if got is None:
            assert path == "int8" and name not in INTEGER_DOT
            continue
        assert (np.abs(got - x.astype(np.float64) @ weight.T) <= 2e-6 * magnitude).all(), path
        for row_of_x in range(m):
            alone = _core.linear(name, blocks.reshape(-1), rows, x[row_of_x : row_of_x + 1], path, level)
            np.testing.assert_array_equal(got[row_of_x : row_of_x + 1], alone, err_msg="depends on the batch")
