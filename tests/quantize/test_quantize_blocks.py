"""quantize_blocks: errors next to llama.cpp's and to the plain references, and what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nybble import _core
from nybble.checkpoint.encodings import ENCODINGS
from nybble.errors import UnsupportedError
from nybble.quantize.blocks import BLOCK_TYPES, quantize_blocks
from support.quantizer_matrices import MATRICES, importance_of, matrix, relative_error

FIXTURE = Path(__file__).parents[1] / "data" / "llama.cpp" / "quantizer_errors.json"
THEIRS: dict[str, dict[str, float]] = json.loads(FIXTURE.read_text(encoding="utf-8"))
CASES = [(name, kind, weighed) for name in BLOCK_TYPES for kind in MATRICES for weighed in (False, True)]


@pytest.mark.parametrize(("name", "kind", "weighed"), CASES)
def test_the_error_is_not_above_llama_cpps(name: str, kind: str, weighed: bool) -> None:
    values = matrix(kind)
    importance = importance_of(values) if weighed else None
    ours = relative_error(values, name, quantize_blocks(values, name, importance=importance), importance)
    theirs = THEIRS[name].get(f"{kind}, importance" if weighed else kind)
    if theirs is None:
        assert not weighed and name in ("iq2_xxs", "iq2_xs")  # llama.cpp refuses
        assert ours < 1
    else:
        assert ours <= theirs * 1.0005


def test_every_type_is_in_the_fixture() -> None:
    assert set(THEIRS) == set(BLOCK_TYPES)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_importance_lowers_the_weighed_error(name: str) -> None:
    values = matrix("normal")
    importance = importance_of(values)
    with_it, without = (
        relative_error(values, name, quantize_blocks(values, name, importance=given), importance)
        for given in (importance, None)
    )
    assert with_it < without


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_threads_and_levels_give_the_same_bytes(name: str, weighed: bool) -> None:
    values = np.concatenate([matrix("tails")] * 2)[:39]
    importance = importance_of(values) if weighed else None
    expected = quantize_blocks(values, name, importance=importance, threads=1)
    for threads in (2, 5):
        assert np.array_equal(quantize_blocks(values, name, importance=importance, threads=threads), expected)
    for isa in _core.isa_levels():
        out = np.zeros_like(expected)
        assert _core.quantize_blocks(name, values, importance, 1, out, isa) == ""
        assert np.array_equal(out, expected), isa


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    values = matrix("tails")[:21]
    importance = importance_of(values)
    for weights in (None, importance):
        whole = quantize_blocks(values, name, importance=weights).reshape(21, -1)
        for start, stop in ((0, 1), (3, 8), (5, 21)):
            part = quantize_blocks(values[start:stop], name, importance=weights)
            assert np.array_equal(part.reshape(stop - start, -1), whole[start:stop])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_importance_counts_up_to_a_factor_and_equal_ones_not_at_all(name: str) -> None:
    values = matrix("normal")
    importance = importance_of(values)
    expected = quantize_blocks(values, name, importance=importance)
    for factor in (2.0**-90, 2.0**100):
        scaled = importance * np.float32(factor)
        assert np.array_equal(quantize_blocks(values, name, importance=scaled), expected)
    zero, one = (quantize_blocks(values, name, importance=np.full(512, k, np.float32)) for k in (0, 1))
    assert np.array_equal(zero, one)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("exponent", [-120, -30, 0, 12])
def test_the_size_of_the_values_makes_no_difference_where_scales_have_room(name: str, exponent: int) -> None:
    values = matrix("normal") * np.float32(50)
    scaled = values * np.float32(2.0**exponent)
    decoded = ENCODINGS[name].dequantize(quantize_blocks(scaled, name))
    assert np.isfinite(decoded).all()
    if exponent < 0 and name != "mxfp4":
        assert (np.abs(decoded) <= np.abs(scaled).max() + 2.0**-24 * 128 * 31).all()  # scales vanish
    elif name != "nvfp4":
        plain = ENCODINGS[name].dequantize(quantize_blocks(values, name))
        assert np.array_equal(decoded, plain * np.float32(2.0**exponent))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zero_stays_zero(name: str) -> None:
    for weights in (None, np.ones(512, np.float32)):
        for value in (0.0, -0.0, 1e-42):
            data = quantize_blocks(np.full((3, 512), value, np.float32), name, importance=weights)
            assert not ENCODINGS[name].dequantize(data).any()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_block_that_stands_out_does_no_harm_to_others(name: str) -> None:
    values = matrix("normal")
    expected = quantize_blocks(values, name).reshape(32, -1)
    spoiled = values.copy()
    spoiled[4] = 1e-42
    spoiled[9] *= 1e5
    rows = np.delete(np.arange(32), [4, 9])
    assert np.array_equal(quantize_blocks(spoiled, name).reshape(32, -1)[rows], expected[rows])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_cannot_be_quantized(name: str) -> None:
    values = matrix("normal")
    with pytest.raises(
        ValueError, match=rf"{name}: a matrix \(rows, columns\) is needed, not shape \(512,\)"
    ):
        quantize_blocks(values[0], name)
    size = ENCODINGS[name].block_size
    with pytest.raises(
        ValueError, match=f"{name}: rows of {size + 1} elements are not whole blocks of {size}"
    ):
        quantize_blocks(np.zeros((2, size + 1), np.float32), name)
    for bad in (np.nan, np.inf, -np.inf):
        wrong = values.copy()
        wrong[17, 300] = bad
        with pytest.raises(ValueError, match=rf"{name}: element \(17, 300\) is -?(nan|inf)"):
            quantize_blocks(wrong, name)
    importance = importance_of(values)
    with pytest.raises(ValueError, match=r"importance has shape \(256,\), the matrix 512 columns"):
        quantize_blocks(values, name, importance=importance[:256])
    for bad in (-1.0, np.nan, np.inf):
        wrong = importance.copy()
        wrong[5] = bad
        with pytest.raises(ValueError, match="the importance of column 5 is"):
            quantize_blocks(values, name, importance=wrong)
    with pytest.raises(ValueError, match="0 threads"):
        quantize_blocks(values, name, threads=0)


def test_unknown_types() -> None:
    with pytest.raises(UnsupportedError, match="unknown encoding 'q9_k'"):
        quantize_blocks(matrix("normal"), "q9_k")
    with pytest.raises(UnsupportedError, match="no block quantizer for f16; there are q4_0"):
        quantize_blocks(matrix("normal"), "f16")


@pytest.mark.parametrize("name", [n for n in BLOCK_TYPES if n not in ("mxfp4", "nvfp4")])
def test_scales_that_do_not_fit_are_refused(name: str) -> None:
    values = matrix("normal")
    values[3] = np.float32(3e38)
    for importance in (None, np.ones(512, np.float32)):
        with pytest.raises(ValueError, match=f"{name}: a scale does not fit in float16; .* 3e\\+38"):
            quantize_blocks(values, name, importance=importance)


def test_an_empty_matrix() -> None:
    assert quantize_blocks(np.zeros((0, 512), np.float32), "q4_k").size == 0
    assert quantize_blocks(np.zeros((4, 0), np.float32), "q4_k").size == 0


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=15, deadline=None)
@given(
    values=hnp.arrays(np.float32, (3, 256), elements=st.floats(-60000, 60000, width=32)),
    weights=st.none() | hnp.arrays(np.float32, 256, elements=st.floats(0, 2.0**99, width=32)),
)
def test_any_values_are_quantized_better_than_to_zero(
    name: str, values: np.ndarray, weights: np.ndarray | None
) -> None:
    data = quantize_blocks(values, name, importance=weights)
    assert data.dtype == np.uint8 and data.size == ENCODINGS[name].nbytes(values.size)
    decoded = ENCODINGS[name].dequantize(data).reshape(values.shape).astype(np.float64)
    assert np.isfinite(decoded).all()
    if weights is None and name not in ("q1_0", "nvfp4"):
        error = ((decoded - values) ** 2).sum()
        assert error <= (values.astype(np.float64) ** 2).sum() * 1.01 + 1e-9


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "q2_k", "q4_k", "q5_k"])
def test_a_column_with_nearly_all_the_weight_leaves_the_others_their_scale(name: str) -> None:
    """Sums that it dominates must not cancel: the others keep about the error that they have without it."""
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    importance = np.full(256, 0.02, np.float32)
    importance[77] = 39007.0

    def errors(weights: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float64]:
        data = quantize_blocks(values, name, importance=weights, threads=1)
        difference = ENCODINGS[name].dequantize(data).reshape(values.shape) - values
        return np.mean(difference.astype(np.float64) ** 2, axis=0)

    plain, weighed = errors(None), errors(importance)
    others = np.arange(256) != 77
    assert weighed[77] < plain[77] / 3
    assert weighed[others].mean() < 2 * plain[others].mean()
