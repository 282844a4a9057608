"""Relations of encodings: what they promise holds for data, and errors are measured right."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nybble.checkpoint.encodings import ENCODINGS, encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.convert import relation as module
from nybble.convert.errors import ValueErrors
from nybble.convert.relation import recoded, relation, relation_of
from nybble.errors import ConversionError
from support.affine_models import tensor_with_minima
from support.random_checkpoints import encoded

NAMES = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q8_0", "q2_k", "q4_k", "q6_k", "iq4_nl", "mxfp4",
    "int4_g32_f16", "int4_g32_f32_z", "int8_g32_f16", "int4_g128_bf16", "int4_g32_f16_m", "int8_g32_f32_m",
]  # fmt: skip
SHAPE = (6, 512)


def tensor(name: str, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    random = np.random.default_rng(seed)
    row = encoding(name)
    if name in ENCODINGS:
        return Tensor("x.weight", shape, row, encoded(random, name, shape, 0.02))
    values = (random.standard_normal(shape) * 0.02).astype(np.float32)
    form = affine_format(name)
    if form is not None and form.has_minimum:
        plain = Tensor("x.weight", shape, encoding("f32"), values.reshape(-1).view(np.uint8))
        return tensor_with_minima(plain, form)
    assert row.quantize is not None
    return Tensor("x.weight", shape, row, row.quantize(values.reshape(-1)))


@pytest.mark.parametrize(("source", "target"), list(product(NAMES, NAMES)))
def test_what_a_relation_says_is_so(source: str, target: str) -> None:
    one, row = tensor(source), encoding(target)
    said, found = relation(one.encoding, row, SHAPE[1]), relation_of(one, row)
    assert (said.kind == "refused") <= (found.kind == "refused")
    if found.kind == "refused":
        assert found.reason and row.quantize is None
        return
    if said.kind == "exact":
        assert found.kind == "exact"
    if source == target:
        assert recoded(one, row) is one
        return
    measured: list[ValueErrors] = []
    made = recoded(one, row, how=found.how, done=measured.append)
    assert made.encoding.name == target and made.name == one.name and made.shape == one.shape
    difference = made.dequantize().astype(np.float64) - one.dequantize()
    assert (found.kind == "exact") == (not difference.any())
    (errors,) = measured
    assert errors.max_error == pytest.approx(np.abs(difference).max(), rel=1e-6)
    assert errors.rms_error == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-5)
    norm = np.sqrt((one.dequantize().astype(np.float64) ** 2).sum())
    assert errors.relative_error == pytest.approx(np.sqrt((difference**2).sum()) / norm, rel=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "how"),
    [
        ("q4_0", "q4_0", "kept"),
        ("bf16", "f32", "widened"),
        ("q6_k", "f32", "dequantized"),
        ("q4_0", "int4_g32_f16", "transcoded"),
        ("int4_g32_f16", "q4_0", "transcoded"),
        ("q8_0", "int8_g32_f16", "transcoded"),
        ("q4_1", "int4_g32_f16_m", "transcoded"),
        ("q4_k", "int4_g32_f32_m", "transcoded"),
        ("q5_k", "int8_g32_f32_m", "transcoded"),
        ("int4_g128_bf16", "f32", "dequantized"),
    ],
)
def test_always_exact(source: str, target: str, how: str) -> None:
    found = relation(encoding(source), encoding(target))
    assert (found.kind, found.how, found.by_data) == ("exact", how, False)


def test_narrowing_is_exact_where_every_value_survives() -> None:
    wide = tensor("f32")
    assert relation_of(wide, encoding("bf16")).kind == "lossy"
    assert relation(wide.encoding, encoding("bf16")).by_data
    rounded = recoded(wide, encoding("bf16"))
    back = recoded(rounded, encoding("f32"))
    found = relation_of(back, encoding("bf16"))
    assert (found.kind, found.how) == ("exact", "rounded")


def test_values_on_a_grid_find_it_again() -> None:
    on_grid = recoded(tensor("q4_1"), encoding("f32"))
    assert relation_of(on_grid, encoding("q4_1")).kind == "exact"
    assert np.array_equal(recoded(on_grid, encoding("q4_1")).data, tensor("q4_1").data)


@pytest.mark.parametrize(
    ("source", "target"),
    [("q6_k", "int8_g16_f16"), ("int4_g32_f32_z", "int4_g32_f16_z"), ("q4_k", "int4_g32_f16_m")],
)
def test_scales_alone_are_rounded_where_that_is_enough(source: str, target: str) -> None:
    one, row = tensor(source), encoding(target)
    found = relation_of(one, row)
    assert (found.kind, found.how) == ("lossy", "scales rounded") and "float16" in found.reason
    sums: list[ValueErrors] = []
    _ = recoded(one, row, how=found.how, done=sums.append).data
    assert 0 < sums[0].relative_error < 2e-3


def test_indices_stay_as_they_are() -> None:
    assert relation(encoding("i32"), encoding("i32")).kind == "exact"
    assert relation(encoding("i32"), encoding("f32")).kind == "refused"
    assert relation(encoding("f32"), encoding("i8")).kind == "refused"


def test_rows_must_be_whole_blocks() -> None:
    found = relation(encoding("f32"), encoding("q8_0"), 48)
    assert found.kind == "refused" and "48" in found.reason


def test_a_value_too_large_for_float16_is_no_rounding_error() -> None:
    values = np.array([[1.0, 70000.0]], np.float32)
    big = Tensor("big", (1, 2), encoding("f32"), values.reshape(-1).view(np.uint8))
    with pytest.raises(ConversionError, match=r"big: the value 70000 does not fit in f16"):
        _ = recoded(big, encoding("f16")).data


def test_what_is_no_number_cannot_be_quantized() -> None:
    values = np.full((1, 32), np.nan, np.float32)
    bad = Tensor("bad", (1, 32), encoding("f32"), values.reshape(-1).view(np.uint8))
    with pytest.raises(ConversionError, match="bad"):
        _ = recoded(bad, encoding("q8_0")).data
    assert relation_of(bad, encoding("bf16")).kind == "exact"


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen, sums = tensor("f32", shape=(301, 512)), [], []

    class Look:
        def see(self, part: np.ndarray, values: np.ndarray) -> np.ndarray:
            assert np.array_equal(part.view("<f4"), values)
            return part

        def take(self, made: np.ndarray) -> None:
            seen.append(made)

    whole = recoded(source, encoding("q4_0"), done=sums.append).data
    monkeypatch.setattr(module, "CHUNK", 2048)
    pieces = recoded(source, encoding("q4_0"), done=sums.append, look=Look).data
    assert np.array_equal(whole, pieces)
    assert len(seen) == -(-301 // 4) and np.array_equal(np.concatenate(seen), source.data)
    assert sums[0].elements == sums[1].elements == 301 * 512
    assert sums[0].relative_error == pytest.approx(sums[1].relative_error, rel=1e-6)


def test_errors_of_nothing() -> None:
    none = ValueErrors()
    assert none.exact and none.rms_error == 0 and none.relative_error == 0
    zeros = np.zeros(3, np.float32)
    assert ValueErrors.of(zeros, zeros + 1).relative_error == np.inf
    nan = np.array([np.nan, 1], np.float32)
    assert ValueErrors.of(nan, nan).exact
