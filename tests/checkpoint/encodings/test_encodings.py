"""The encodings table: every type against the PyPI package gguf, and properties of the quantizers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nybble.checkpoint import Tensor
from nybble.checkpoint.encodings import ENCODINGS, REMOVED_GGML_TYPES, encoding, from_ggml_type
from nybble.errors import UnsupportedError

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parents[3]

# Byte offsets of the float16 fields in a block, to make random blocks with finite scales.
HALF_FIELDS = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq1_s": (0,), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
    "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,),
    "f32": (), "f16": (0,), "bf16": (), "iq1_m": (), "mxfp4": (), "nvfp4": (),
}  # fmt: skip
QUANTIZED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def random_blocks(name: str, count: int, seed: int = 0, finite: bool = True) -> np.ndarray:
    row = ENCODINGS[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, row.block_bytes), dtype=np.uint8)
    if finite:
        for at in HALF_FIELDS[name]:
            scale = rng.standard_normal((count, 1)).astype("<f2")
            blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks


def same_bits(got: np.ndarray, expected: np.ndarray) -> bool:
    """Equal to the last bit, but for which not-a-number it is."""
    equal = got.view(np.uint32) == expected.view(np.uint32)
    return bool((equal | (np.isnan(got) & np.isnan(expected))).all())


@pytest.mark.parametrize("finite", [True, False], ids=["finite scales", "any bytes"])
@pytest.mark.parametrize("name", HALF_FIELDS)
def test_dequantize_equals_gguf(name: str, finite: bool) -> None:
    blocks = random_blocks(name, 96, finite=finite)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]).reshape(-1)
    got = ENCODINGS[name].dequantize(blocks.reshape(-1))
    assert got.dtype == np.float32
    assert got.shape == (96 * ENCODINGS[name].block_size,)
    assert same_bits(got, expected)
    if finite and name not in ("f32", "bf16", "iq1_m", "mxfp4"):
        assert np.isfinite(got).all() and np.abs(got).max() > 0


def test_every_gguf_type_has_a_row_of_its_size() -> None:
    for kind, size in gguf.GGML_QUANT_SIZES.items():
        row = ENCODINGS[kind.name.lower()]
        assert row.ggml_type == kind.value
        assert from_ggml_type(kind.value) is row
        if row.name != "q8_1":  # gguf still has the size of 2023; block_q8_1 has two float16 since
            assert (row.block_size, row.block_bytes) == size
    assert set(ENCODINGS) == set(HALF_FIELDS) | {
        "i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k", "q1_0", "q2_0",
    }  # fmt: skip


def test_the_rows_agree_with_the_kernels_header() -> None:
    header = (ROOT / "native" / "core" / "encoding.h").read_text(encoding="utf-8")
    names = re.search(r"enum class Encoding : int32_t \{(.*?)\}", header, re.S)
    assert names is not None
    kernels = [name for name in re.findall(r"\w+", names[1]) if name != "count"]
    assert len(kernels) > 20
    assert [encoding(name).name for name in kernels] == kernels


def test_block_sizes_agree_with_the_native_table() -> None:
    source = (ROOT / "native" / "core" / "encoding.cpp").read_text(encoding="utf-8")
    rows = re.findall(r'\{"(\w+)", (\d+), (\d+)\}', source)
    assert len(rows) > 20
    for name, block_size, block_bytes in rows:
        row = encoding(name)
        assert (row.block_size, row.block_bytes) == (int(block_size), int(block_bytes)), name


def test_the_codebook_header_is_up_to_date() -> None:
    script = ROOT / "native" / "kernels" / "make_iq_grids.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


def test_importing_the_table_decodes_no_codebook() -> None:
    code = (
        "import nybble.checkpoint.encodings as e; from nybble.checkpoint.encodings import iq_grids as g;"
        "print(g.grid.cache_info().currsize, g.signs.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0"]


def test_hand_made_blocks_of_types_that_gguf_does_not_decode() -> None:
    half = np.array([0.5], "<f2").tobytes()
    codes = np.arange(-16, 16, dtype=np.int8)
    q8_1 = np.frombuffer(half + half + codes.tobytes(), np.uint8)
    assert ENCODINGS["q8_1"].dequantize(q8_1).tolist() == (codes * 0.5).tolist()

    codes = (np.arange(256) - 128).astype(np.int8)
    q8_k = np.frombuffer(np.float32(0.25).tobytes() + codes.tobytes() + bytes(32), np.uint8)
    assert ENCODINGS["q8_k"].dequantize(q8_k).tolist() == (codes * 0.25).tolist()

    q1_0 = np.frombuffer(half + bytes([0b00000101]) + bytes(15), np.uint8)
    assert ENCODINGS["q1_0"].dequantize(q1_0)[:4].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert ENCODINGS["q1_0"].dequantize(q1_0)[4:].tolist() == [-0.5] * 124

    q2_0 = np.frombuffer(half + bytes([0b11100100]) + bytes(15), np.uint8)
    assert ENCODINGS["q2_0"].dequantize(q2_0)[:5].tolist() == [-0.5, 0.0, 0.5, 1.0, -0.5]


@pytest.mark.parametrize(
    ("name", "dtype"), [("i8", "i1"), ("i16", "<i2"), ("i32", "<i4"), ("i64", "<i8"), ("f64", "<f8")]
)
def test_plain_data(name: str, dtype: str) -> None:
    values = np.array([-128, -1, 0, 1, 127], dtype=dtype)
    row = ENCODINGS[name]
    got = row.dequantize(values.view(np.uint8))
    assert got.dtype == np.float32 and got.tolist() == [-128, -1, 0, 1, 127]
    assert row.quantize is not None
    assert row.quantize(got).tobytes() == values.tobytes()


def test_integers_round_and_saturate() -> None:
    quantize = ENCODINGS["i8"].quantize
    assert quantize is not None
    assert quantize(np.array([0.5, 1.5, -300, 1e30], np.float32)).view(np.int8).tolist() == [0, 2, -128, 127]
    wide = ENCODINGS["i64"].quantize
    assert wide is not None
    assert wide(np.array([np.inf, -np.inf], np.float32)).view("<i8").tolist() == [2**63 - 1024, -(2**63)]
    with pytest.raises(ValueError, match="i8: element 1 is not a number"):
        quantize(np.array([0, np.nan], np.float32))


def test_bf16_equals_gguf() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    row = ENCODINGS["bf16"]
    assert row.quantize is not None
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    assert row.quantize(values).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("kind", ["normal", "uniform", "sparse", "grid", "tiny", "constant"])
def test_quantize_equals_gguf(name: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    shape = (256, 32)
    values = {
        "normal": lambda: rng.standard_normal(shape),
        "uniform": lambda: rng.uniform(-3, 5, shape),
        "sparse": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.05),
        "grid": lambda: rng.integers(-8, 8, shape) * 0.5,
        "tiny": lambda: rng.standard_normal(shape) * 1e-6,
        "constant": lambda: np.full(shape, -1.25),
    }[kind]().astype(np.float32)
    row = ENCODINGS[name]
    assert row.quantize is not None
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])
    assert row.quantize(values.reshape(-1)).tobytes() == expected.tobytes()


blocks_of_floats = hnp.arrays(
    np.float32,
    st.integers(0, 4).map(lambda n: 32 * n),
    elements=st.floats(-60000, 60000, width=32),
)


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=50, deadline=None)
@given(values=blocks_of_floats)
def test_quantize_is_close_and_of_the_right_size(name: str, values: np.ndarray) -> None:
    row = ENCODINGS[name]
    assert row.quantize is not None
    data = row.quantize(values)
    assert data.dtype == np.uint8 and data.size == row.nbytes(values.size)
    back = row.dequantize(data).reshape(-1, 32)
    original = values.reshape(-1, 32)
    steps = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 127}[name]
    reach = np.abs(original).max(axis=1, keepdims=True)
    span = np.ptp(original, axis=1, keepdims=True) if name.endswith("_1") else reach
    # At most one step (the end of the symmetric types is cut off), and float16's rounding.
    assert (np.abs(back - original) <= span / steps + reach * 2**-10 + 1e-4).all()


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0", "f16", "bf16", "f32"])
@settings(max_examples=50, deadline=None)
@given(values=blocks_of_floats)
def test_quantizing_again_changes_nothing(name: str, values: np.ndarray) -> None:
    row = ENCODINGS[name]
    assert row.quantize is not None
    once = row.dequantize(row.quantize(values))
    assert np.array_equal(row.dequantize(row.quantize(once)), once)  # but for the sign of a zero


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(ENCODINGS)), count=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_decode(name: str, count: int, seed: int) -> None:
    row = ENCODINGS[name]
    data = np.random.default_rng(seed).integers(0, 256, count * row.block_bytes, dtype=np.uint8)
    data.flags.writeable = False
    values = row.dequantize(data)
    assert values.dtype == np.float32 and values.shape == (count * row.block_size,)
    assert row.nbytes(values.size) == data.size


def test_large_tensors_are_decoded_in_chunks_alike() -> None:
    row = ENCODINGS["q4_k"]
    blocks = random_blocks_any("q4_k", 5000)
    whole = row.dequantize(blocks.reshape(-1))
    assert whole.size > 1 << 20
    assert same_bits(whole[-256:], row.dequantize(blocks[-1]))


def random_blocks_any(name: str, count: int) -> np.ndarray:
    return random_blocks(name, count, seed=9, finite=True)


def test_errors_name_what_is_wrong() -> None:
    row = ENCODINGS["q4_0"]
    assert row.quantize is not None
    with pytest.raises(ValueError, match="q4_0: 17 bytes are not a multiple of the block's 18 bytes"):
        row.dequantize(np.zeros(17, np.uint8))
    with pytest.raises(TypeError, match="q4_0: encoded data must be uint8, not float32"):
        row.dequantize(np.zeros(18, np.float32))
    with pytest.raises(ValueError, match="q4_0: 31 elements are not a multiple of the block size 32"):
        row.quantize(np.zeros(31, np.float32))
    with pytest.raises(ValueError, match="q4_0: element 3 is inf"):
        row.quantize(np.array([0, 0, 0, np.inf] * 8, np.float32))
    with pytest.raises(ValueError, match=r"q4_0: scale or minimum .* does not fit in float16"):
        row.quantize(np.full(32, 1e9, np.float32))
    with pytest.raises(ValueError, match="f32: 3 bytes are not a multiple of the element's 4 bytes"):
        ENCODINGS["f32"].dequantize(np.zeros(3, np.uint8))
    with pytest.raises(UnsupportedError, match=r"unknown encoding 'q9_9'; known: f32, f16, bf16, .*nvfp4"):
        encoding("q9_9")
    with pytest.raises(UnsupportedError, match="type number 4 is q4_2, which was removed"):
        from_ggml_type(4)
    with pytest.raises(UnsupportedError, match="unknown type number 999; known: 0 f32, 1 f16"):
        from_ggml_type(999)
    assert not set(REMOVED_GGML_TYPES) & {row.ggml_type for row in ENCODINGS.values()}


def test_tensor_dequantizes_into_its_shape() -> None:
    row = encoding("q8_0")
    assert row.quantize is not None
    values = np.arange(64, dtype=np.float32).reshape(2, 32) * 127 / 63
    tensor = Tensor("x", (2, 32), row, row.quantize(values))
    assert tensor.nbytes == 68
    assert tensor.dequantize().shape == (2, 32)
    assert np.abs(tensor.dequantize() - values).max() < 0.6


@pytest.mark.parametrize("row", ENCODINGS.values(), ids=lambda row: row.name)
def test_every_row_is_documented(row) -> None:
    assert "value" in row.layout
    assert row.source.startswith("https://")
    assert row.bits_per_weight == (8 * row.block_bytes - row.spare_bits) / row.block_size
    assert 0 <= row.spare_bits < 8
    assert all(len(line) <= 115 for line in row.layout.splitlines())
