"""GGUF's blocks and affine integers, each as the other: the same values bit for bit, or a refusal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineParts, affine_format, join
from nybble.convert.transcode.common_factor import common_factor
from nybble.convert.transcode.ggml_affine import Inexact, relation, transcode
from nybble.convert.transcode.ggml_blocks import BLOCK_TYPES
from nybble.convert.transcode.groups import DoesNotFit

COLUMNS = 512
Bytes = npt.NDArray[np.uint8]

ALWAYS = [
    ("q4_0", "int4_g32_f16"),
    ("q4_0", "int4_g32_f16_z"),
    ("q4_0", "int4_g16_f32"),
    ("q4_0", "int8_g32_f16"),
    ("q4_0", "q5_0"),
    ("q4_0", "q8_0"),
    ("q5_0", "int8_g32_f16"),
    ("q5_0", "int8_g32_f32_z"),
    ("q5_0", "q8_0"),
    ("q8_0", "int8_g32_f16"),
    ("q8_0", "int8_g16_f32"),
    ("q6_k", "int8_g16_f32"),
    ("q6_k", "int8_g8_f32_z"),
    ("int4_g32_f16", "q4_0"),
    ("int4_g128_f16", "q4_0"),
    ("int4_g64_f16", "q8_0"),
    ("int4_g32_f16", "int8_g32_f32_z"),
    ("int4_g64_f16_z", "int4_g32_f32_z"),
    ("int4_g64_bf16_z", "int8_g64_bf16_z"),
    ("int2_g32_f16", "int4_g32_f16"),
    ("int8_g256_f16", "q8_0"),
    ("int8_g32_f16", "q8_0"),
    ("q4_1", "int4_g32_f16_m"),
    ("int4_g32_f16_m", "q4_1"),
    ("q4_1", "int4_g32_f32_m"),
    ("q4_1", "int8_g16_f32_m"),
    ("q5_1", "int8_g32_f16_m"),
    ("q5_1", "int8_g32_f32_m"),
    ("q4_k", "int4_g32_f32_m"),
    ("q4_k", "int8_g8_f32_m"),
    ("q5_k", "int8_g32_f32_m"),
    ("int4_g64_bf16_m", "int8_g32_f32_m"),
]
BY_DATA = [
    ("q4_1", "int4_g32_f16_z"),
    ("q4_1", "int8_g32_f16_z"),
    ("q5_1", "int8_g32_f16_z"),
    ("q4_k", "int4_g32_f32_z"),
    ("q5_k", "int8_g32_f32_z"),
    ("q6_k", "int8_g16_f16"),
    ("q4_0", "int4_g128_f16"),
    ("int8_g32_f16", "q5_0"),
    ("int8_g32_f16", "q4_0"),
    ("int8_g16_f32", "q6_k"),
    ("int8_g32_f16", "q6_k"),
    ("int4_g32_f32", "q4_0"),
    ("int4_g32_bf16", "int4_g32_f16"),
    ("int4_g128_f16_z", "q4_1"),
    ("int4_g32_f16_z", "q5_1"),
    ("int4_g32_f16_z", "int4_g32_f16"),
    ("int4_g32_f16_z", "int4_g128_f16_z"),
    ("int4_g32_f32_z", "q4_k"),
    ("int8_g32_f32_z", "q5_k"),
    ("int4_g32_f16", "q4_k"),
    ("int4_g32_f32_m", "q4_1"),
    ("int4_g32_f16_m", "q5_1"),
    ("int4_g32_f32_m", "q4_k"),
    ("int8_g32_f32_m", "q5_k"),
    ("int8_g32_f32_m", "q5_1"),
    ("int4_g32_f32_m", "int4_g32_f16_m"),
    ("int4_g32_f32_m", "int4_g64_f32_m"),
    ("int4_g32_f32_m", "int4_g32_f32_z"),
    ("int4_g32_f32_z", "int4_g32_f32_m"),
    ("int4_g32_f16_m", "q4_0"),
    ("q4_0", "int4_g32_f16_m"),
    ("q4_k", "int4_g32_f16_m"),
]


def blocks(kind: str, raw: Bytes) -> Bytes:
    """Random bytes as blocks, with scales that are numbers."""
    row = encoding(kind)
    data = np.resize(raw, row.nbytes(2 * COLUMNS)).reshape(-1, row.block_bytes).copy()
    form = affine_format(kind)
    places = {"q6_k": [208], "q4_1": [0, 2], "q5_1": [0, 2], "q4_k": [0, 2], "q5_k": [0, 2]}.get(kind, [0])
    width = 2 if form is None else form.scale_bytes
    if form is not None and form.has_minimum:
        places = [0, width]
    for place in places:
        # The exponent never all ones: neither infinite nor not a number.
        data[:, place + width - 1] &= np.uint8(0xBF)
    return data.reshape(-1)


def bits(kind: str, data: Bytes) -> npt.NDArray[np.uint32]:
    return encoding(kind).dequantize(data).view(np.uint32)


random_bytes = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 256, 3000, np.uint8)
)
few_bytes = st.binary(min_size=1, max_size=40).map(lambda raw: np.frombuffer(raw, np.uint8))


@pytest.mark.parametrize(("source", "target"), ALWAYS)
@given(raw=random_bytes | few_bytes)
@settings(max_examples=25, deadline=None)
def test_always_exact(source: str, target: str, raw: Bytes) -> None:
    assert relation(source, target) == "exact"
    data = blocks(source, raw)
    result = transcode(data, source, target, COLUMNS)
    assert not isinstance(result, Inexact), result
    np.testing.assert_array_equal(bits(source, data), bits(target, result))


@pytest.mark.parametrize(("source", "target"), BY_DATA)
@given(raw=random_bytes | few_bytes)
@settings(max_examples=40, deadline=None)
def test_exact_or_refused_with_a_block(source: str, target: str, raw: Bytes) -> None:
    """What is given is exact; what is refused names a block that really is in the data."""
    assert relation(source, target) == "depends"
    data = blocks(source, raw)
    result = transcode(data, source, target, COLUMNS)
    if isinstance(result, Inexact):
        assert 0 <= result.block < data.size // encoding(source).block_bytes
        assert result.reason
        # All blocks before it go through where blocks do not share anything.
        whole = max(encoding(source).block_size, encoding(target).block_size)
        before = result.block * encoding(source).block_size // whole * whole
        if before:
            head = data[: encoding(source).nbytes(before)]
            first = transcode(head, source, target, before)
            assert not isinstance(first, Inexact)
            np.testing.assert_array_equal(bits(source, head), bits(target, first))
    else:
        np.testing.assert_array_equal(bits(source, data), bits(target, result))


# -- data that does fit ----------------------------------------------------------------------------------


def halves(generator: np.random.Generator, count: int) -> npt.NDArray[np.float16]:
    """Positive float16 with few bits, so that small multiples are float16 too."""
    return (generator.integers(1, 64, count) * 2.0 ** generator.integers(-12, 3, count)).astype(np.float16)


def affine(kind: str, seed: int, highest: int, zero: tuple[int, int] | None = None) -> Bytes:
    """Random groups with codes 0 to ``highest`` and zero points in a range."""
    form = affine_format(kind)
    assert form is not None
    generator = np.random.default_rng(seed)
    groups = 2 * COLUMNS // form.group_size
    scales = halves(generator, groups).astype({"f16": "<f2", "f32": "<f4"}[form.scale])
    points = None if zero is None else generator.integers(*zero, (groups, 1), np.uint8, endpoint=True)
    codes = generator.integers(0, highest, (groups, form.group_size), np.uint8, endpoint=True)
    return join(AffineParts(codes, scales.view(np.uint8).reshape(groups, 1, -1), points), form)


def assert_there_and_back(data: Bytes, kind: str, target: str, columns: int) -> None:
    """The same values, bit for bit, in the target and back in the first encoding."""
    there = transcode(data, kind, target, columns)
    assert not isinstance(there, Inexact), there
    np.testing.assert_array_equal(bits(kind, data), bits(target, there))
    back = transcode(there, target, kind, columns)
    assert not isinstance(back, Inexact), back
    np.testing.assert_array_equal(bits(kind, data), bits(kind, back))


@pytest.mark.parametrize(
    ("kind", "target", "highest", "zero"),
    [
        ("int4_g32_f16_z", "q4_1", 15, (0, 15)),
        ("int4_g128_f16_z", "q4_1", 15, (0, 15)),
        ("int8_g32_f16_z", "q4_1", 15, (0, 40)),
        ("int8_g32_f16_z", "q5_1", 31, (0, 31)),
        ("int4_g32_f16_z", "int4_g32_f16", 15, (8, 8)),
        ("int4_g32_f32", "q4_0", 15, None),
        ("int4_g32_f16", "q4_1", 15, None),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_there_and_back_again(
    kind: str, target: str, highest: int, zero: tuple[int, int] | None, seed: int
) -> None:
    data = affine(kind, seed, highest, zero)
    assert_there_and_back(data, kind, target, COLUMNS)


@pytest.mark.parametrize(("kind", "target"), [("q4_k", "int4_g32_f32_z"), ("q5_k", "int8_g32_f32_z")])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_k_types_whose_minima_are_multiples(kind: str, target: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = 4
    data = generator.integers(0, 256, (count, encoding(kind).block_bytes), np.uint8)
    # Scales are powers of two, minima any multiple of them that six bits hold.
    scales = 2 ** generator.integers(0, 3, (count, 8))
    points = generator.integers(0, 16, (count, 8))
    minima = np.minimum(scales * points, 60 // scales * scales)
    data[:, 0:2] = data[:, 2:4] = halves(generator, count).view(np.uint8).reshape(count, 2)
    data[:, 4:8] = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    data[:, 8:12] = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    data[:, 12:16] = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    assert_there_and_back(data.reshape(-1), kind, target, 256)


@pytest.mark.parametrize(
    ("kind", "target"),
    [("q4_1", "int4_g32_f32_m"), ("q5_1", "int8_g32_f32_m"), ("q5_1", "int8_g32_f16_m")],
)
@given(raw=random_bytes)
@settings(max_examples=20, deadline=None)
def test_blocks_with_a_minimum_come_back_byte_for_byte(kind: str, target: str, raw: Bytes) -> None:
    data = blocks(kind, raw)
    there = transcode(data, kind, target, COLUMNS)
    assert not isinstance(there, Inexact)
    back = transcode(there, target, kind, COLUMNS)
    assert not isinstance(back, Inexact)
    assert back.tobytes() == data.tobytes()


@pytest.mark.parametrize(("kind", "target"), [("q4_k", "int4_g32_f32_m"), ("q5_k", "int8_g32_f32_m")])
@given(raw=random_bytes, zeros=st.booleans())
@settings(max_examples=30, deadline=None)
def test_k_types_with_any_minima_are_found_again(kind: str, target: str, raw: Bytes, zeros: bool) -> None:
    """Any signs of scale and minimum; with ``zeros`` half of the minima are 0."""
    data = blocks(kind, raw)
    if zeros:
        data.reshape(-1, encoding(kind).block_bytes)[:, 8:12] = 0
    assert_there_and_back(data, kind, target, COLUMNS)


@pytest.mark.parametrize(("kind", "target"), [("q4_k", "int4_g32_f32_m"), ("q5_k", "int8_g32_f32_m")])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_k_types_as_quantizers_make_them_come_back_byte_for_byte(kind: str, target: str, seed: int) -> None:
    """The largest scale and the largest minimum are 63, as in llama.cpp's quantizer."""
    generator = np.random.default_rng(seed)
    count = 4
    data = generator.integers(0, 256, (count, encoding(kind).block_bytes), np.uint8)
    data[:, 0:2] = halves(generator, count).view(np.uint8).reshape(count, 2)
    data[:, 2:4] = halves(generator, count).view(np.uint8).reshape(count, 2)
    data[:, 4] |= 63
    data[:, 9] |= 63
    there = transcode(data.reshape(-1), kind, target, 256)
    assert not isinstance(there, Inexact), there
    back = transcode(there, target, kind, 256)
    assert not isinstance(back, Inexact), back
    assert back.tobytes() == data.tobytes()


@given(raw=random_bytes)
@settings(max_examples=30, deadline=None)
def test_q6_k_is_found_again(raw: Bytes) -> None:
    data = blocks("q6_k", raw)
    affine_data = transcode(data, "q6_k", "int8_g16_f32", COLUMNS)
    assert not isinstance(affine_data, Inexact)
    back = transcode(affine_data, "int8_g16_f32", "q6_k", COLUMNS)
    assert not isinstance(back, Inexact)
    np.testing.assert_array_equal(bits("q6_k", data), bits("q6_k", back))


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q8_0"])
@given(raw=random_bytes)
@settings(max_examples=20, deadline=None)
def test_symmetric_blocks_come_back_byte_for_byte(kind: str, raw: Bytes) -> None:
    data = blocks(kind, raw)
    target = "int4_g32_f16" if kind == "q4_0" else "int8_g32_f16"
    there = transcode(data, kind, target, COLUMNS)
    assert not isinstance(there, Inexact)
    back = transcode(there, target, kind, COLUMNS)
    assert not isinstance(back, Inexact)
    assert back.tobytes() == data.tobytes()


def test_the_lowest_code_of_q8_0_goes_both_ways() -> None:
    data = np.array([0, 60, *range(128, 160)], np.uint8)  # codes -128 to -97
    there = transcode(data, "q8_0", "int8_g32_f16", 32)
    assert not isinstance(there, Inexact)
    assert there[2:].tolist() == list(range(32))
    back = transcode(there, "int8_g32_f16", "q8_0", 32)
    assert not isinstance(back, Inexact)
    assert back.tobytes() == data.tobytes()


# -- refusals --------------------------------------------------------------------------------------------


def group(kind: str, scale: float, codes: list[int], point: int | None = None) -> Bytes:
    form = affine_format(kind)
    assert form is not None
    stored = np.array([scale], {"f16": "<f2", "f32": "<f4"}[form.scale]).view(np.uint8).reshape(1, 1, -1)
    points = None if point is None else np.array([[point]], np.uint8)
    values = np.resize(np.array(codes, np.uint8), (1, form.group_size))
    return join(AffineParts(values, stored, points), form)


GOOD = group("int8_g32_f32_z", 0.5, [3, 4], 3)


@pytest.mark.parametrize(
    ("bad", "target", "reason"),
    [
        (group("int8_g32_f32_z", 0.1, [3, 4], 0), "q4_1", "its scale is not a float16"),
        (group("int8_g32_f32_z", 0.1, [3, 4], 3), "int8_g32_f16_z", "its scale is not a float16"),
        (group("int8_g32_f32_z", 1e6, [3, 4], 3), "int8_g32_f16_z", "its scale is not a float16"),
        (group("int8_g32_f32_z", 0.1, [3, 4], 3), "int8_g32_bf16_z", "its scale is not a bfloat16"),
        (group("int8_g32_f32_z", 0.5, [3, 16], 3), "q4_1", "its codes do not fit in 0 to 15"),
        (group("int8_g32_f32_z", 0.5, [3, 20], 3), "q4_0", "its codes do not fit in 0 to 15"),
        (group("int8_g32_f32_z", 2.0**-24, [3], 3), "q4_1", None),
        (group("int8_g32_f32_z", 65504.0, [3], 3), "q4_1", "its minimum is not a float16"),
        (group("int8_g32_f32_z", -0.5, [3], 3), "q4_1", "its scale is negative beside a minimum"),
        (group("int8_g32_f32_z", 0.0, [2], 3), "q4_1", "its scale is negative beside a minimum"),
        (group("int8_g32_f32_z", np.nan, [3], 3), "int8_g32_f16_z", "its scale is not a float16"),
    ],
)
def test_the_second_group_is_refused(bad: Bytes, target: str, reason: str | None) -> None:
    result = transcode(np.concatenate([GOOD, bad]), "int8_g32_f32_z", target, 64)
    if reason is None:
        assert not isinstance(result, Inexact)
    else:
        assert result == Inexact(1, reason)


def group_with_minimum(kind: str, scale: float, minimum: float, codes: list[int]) -> Bytes:
    form = affine_format(kind)
    assert form is not None
    stored = np.array([scale, minimum], {"f16": "<f2", "f32": "<f4"}[form.scale]).view(np.uint8)
    values = np.resize(np.array(codes, np.uint8), (1, form.group_size))
    scales, minima = stored.reshape(2, 1, 1, -1)
    return join(AffineParts(values, scales, None, minima), form)


@pytest.mark.parametrize(
    ("scale", "minimum", "code", "target", "reason"),
    [
        (0.1, 1.0, 3, "q4_1", "its scale is not a float16"),
        (0.5, 0.1, 3, "q4_1", "its minimum is not a float16"),
        (0.5, 0.1, 16, "q4_1", "its codes do not fit in 0 to 15"),
        (-0.5, -0.0, 3, "q4_1", None),
        (0.1, -0.1, 3, "int8_g32_f32_z", "codes times its scale are rounded"),
        (0.5, -0.7, 3, "int8_g32_f32_z", "its minimum is not a whole multiple of its scale"),
        (0.5, 0.1, 3, "int8_g32_bf16_m", "its minimum is not a bfloat16"),
        (0.5, -1.5, 3, "int8_g32_f32_z", None),
    ],
)
def test_the_second_group_with_a_minimum_is_refused(
    scale: float, minimum: float, code: int, target: str, reason: str | None
) -> None:
    bad = group_with_minimum("int8_g32_f32_m", scale, minimum, [code])
    good = group_with_minimum("int8_g32_f32_m", 0.5, -1.0, [3, 4])
    data = np.concatenate([good, bad])
    result = transcode(data, "int8_g32_f32_m", target, 64)
    if reason is None:
        assert not isinstance(result, Inexact)
        np.testing.assert_array_equal(bits("int8_g32_f32_m", data), bits(target, result))
    else:
        assert result == Inexact(1, reason)


def test_a_large_tensor_names_the_right_block() -> None:
    data = np.zeros((50000, 20), np.uint8)  # q4_1: all zeros
    data[:, 1] = 0x3C  # scale 1
    data[45678, 3] = 0x38  # minimum 0.5
    reason = "its minimum is not a whole multiple of its scale"
    assert transcode(data.reshape(-1), "q4_1", "int4_g32_f16_z", 32) == Inexact(45678, reason)
    data[45678, 3] = 0xC0  # minimum -2
    result = transcode(data.reshape(-1), "q4_1", "int4_g32_f16_z", 32)
    assert not isinstance(result, Inexact)
    assert result.reshape(-1, 19)[45678, 2] == 2


def test_groups_share_a_scale_only_if_it_is_the_same() -> None:
    same = np.concatenate([group("int4_g32_f16", 0.5, [1])] * 4)
    result = transcode(same, "int4_g32_f16", "int4_g128_f16", 128)
    assert not isinstance(result, Inexact)
    assert result.size == 66
    other = np.concatenate([same, same[:-18], group("int4_g32_f16", 0.25, [1])])
    assert transcode(other, "int4_g32_f16", "int4_g128_f16", 128) == Inexact(
        4, "its neighbours in a group of 128 have another scale"
    )


def test_ways_that_do_not_exist() -> None:
    for source, target in [
        ("f16", "int4_g32_f16"),
        ("q4_0", "q2_k"),
        ("iq4_nl", "int4_g32_f16"),
        ("int4_g48_f16", "q4_0"),
    ]:
        assert relation(source, target) is None
        with pytest.raises(ValueError, match=f"no exact way from {source} to {target}"):
            transcode(np.zeros(0, np.uint8), source, target, 96)
    with pytest.raises(ValueError, match="q4_0: rows of 48 are no multiple of 32"):
        transcode(np.zeros(0, np.uint8), "q4_0", "int4_g16_f16", 48)
    assert all(relation(name, name) == "exact" for name in [*BLOCK_TYPES, "int4_g32_f16"])


@given(st.integers(0, 2**16 - 1), st.lists(st.integers(-128, 127), min_size=1, max_size=16))
@settings(max_examples=200, deadline=None)
def test_common_factor_finds_what_was_multiplied(raw: int, integers: list[int]) -> None:
    factor = np.array([raw], np.uint16).view(np.float16)
    assume(bool(np.isfinite(factor).all()))
    values = factor.astype(np.float64) * np.array([integers])
    found, numbers = common_factor(values, -128, 127, "scales")
    product = found.astype(np.float64)[:, None] * numbers
    np.testing.assert_array_equal(product, values)
    np.testing.assert_array_equal(np.signbit(product), np.signbit(values))


def test_common_factor_may_be_negative() -> None:
    factors, integers = common_factor(np.array([[-1.5, -0.5, -0.0]]), 0, 63, "minima")
    assert factors[0] < 0 and (factors[0] * integers[0] == [-1.5, -0.5, 0.0]).all()


def test_common_factor_refuses() -> None:
    with pytest.raises(DoesNotFit, match="its scales are not whole multiples of one float16") as caught:
        common_factor(np.array([[1.0, 2.0], [1.0, np.pi]]), -128, 127, "scales")
    assert caught.value.group == 2
    with pytest.raises(DoesNotFit):
        common_factor(np.array([[-1.0, 0.5]]), 0, 63, "scales")
    with pytest.raises(DoesNotFit):
        common_factor(np.array([[np.nan, 1.0]]), -128, 127, "scales")
