"""Mixes for a budget: the choice against all choices that there are, and what targets may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.quantize.budget import Option, best_mix, candidates, mix_for_budget
from nybble.quantize.importance import Importance, ImportanceMatrix
from nybble.quantize.quantize import CalibrationOptions
from support.random_checkpoints import LLAMA, random_checkpoint

options = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4
).map(lambda rows: [Option(f"e{i}", bits, cost) for i, (bits, cost) in enumerate(rows)])


def best_of_all(choices: Mapping[str, Sequence[Option]], budget: float) -> float:
    """The smallest sum of costs that fits, by trying everything."""
    fitting = [
        sum(option.cost for option in picked)
        for picked in product(*choices.values())
        if sum(option.bits for option in picked) <= budget
    ]
    return min(fitting)


@given(st.lists(options, min_size=1, max_size=4), st.floats(0, 1))
def test_the_budget_is_kept_and_the_choice_is_near_the_best(rows: list[list[Option]], share: float) -> None:
    choices = {f"t{i}": row for i, row in enumerate(rows)}
    least = sum(min(option.bits for option in row) for row in rows)
    most = sum(max(option.bits for option in row) for row in rows)
    budget = least + share * (most - least)
    chosen = best_mix(choices, budget)
    assert chosen.keys() == choices.keys()
    assert sum(option.bits for option in chosen.values()) <= budget
    assert all(option in choices[name] for name, option in chosen.items())
    # The relaxed problem's optimum is missed by one step at most: no step can save more than the largest
    # difference of costs of one matrix.
    slack = max(max(o.cost for o in row) - min(o.cost for o in row) for row in rows)
    assert sum(option.cost for option in chosen.values()) <= best_of_all(choices, budget) + slack + 1e-9


def test_with_room_for_all_every_matrix_gets_its_best() -> None:
    choices = {
        "a": [Option("x", 4, 1.0), Option("y", 8, 0.5), Option("z", 6, 2.0)],
        "b": [Option("x", 4, 1.0)],
    }
    chosen = best_mix(choices, 100)
    assert (chosen["a"].name, chosen["b"].name) == ("y", "x")


def test_bits_go_where_they_save_most() -> None:
    choices = {
        name: [Option("small", 4, 4 * weight), Option("large", 8, weight)]
        for name, weight in (("little", 0.1), ("much", 1.0))
    }
    chosen = best_mix(choices, 12)
    assert (chosen["little"].name, chosen["much"].name) == ("small", "large")


def test_a_step_that_does_not_fit_does_not_keep_others_out() -> None:
    choices = {
        "large": [Option("small", 10, 100.0), Option("large", 100, 0.0)],
        "little": [Option("small", 1, 1.0), Option("large", 2, 0.0)],
    }
    chosen = best_mix(choices, 13)
    assert (chosen["large"].name, chosen["little"].name) == ("small", "large")


def test_too_small_a_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="12 bits are the least"):
        best_mix({"a": [Option("x", 12, 1.0)]}, 11)


def matrix(name: str, columns: int) -> Tensor:
    data = np.zeros((8, columns), np.float32)
    return Tensor(name, data.shape, encoding("f32"), data.reshape(-1).view(np.uint8))


def test_candidates_divide_the_rows_and_fit_the_target() -> None:
    layer, embedding = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    assert "q4_k" in candidates(matrix(layer, 512), "gguf", tied=True)
    assert set(candidates(matrix(layer, 96), "gguf", tied=True)) == {
        "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0",
    }  # fmt: skip
    assert candidates(matrix(layer, 20), "gguf", tied=True) == []
    assert "int4_g32_f32" in candidates(matrix(layer, 96), "onnx-cpu-int4", tied=True)
    assert "int4_g32_f16_z" in candidates(matrix(layer, 96), "onnx-dml-int4", tied=True)
    assert candidates(matrix(embedding, 96), "onnx-cpu-int4", tied=False) == []
    assert candidates(matrix(embedding, 96), "onnx-cpu-int4", tied=True)
    assert candidates(matrix(embedding, 96), "safetensors", tied=True) == []


@pytest.mark.parametrize(
    ("bits", "message"), [(1.0, "the smallest"), (float("nan"), "above 0"), (-2.0, "above 0")]
)
def test_impossible_budgets_say_so(bits: float, message: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(LLAMA, 1)
    with pytest.raises(UnsupportedError, match=message):
        mix_for_budget(
            checkpoint,
            bits,
            to="gguf",
            quantization=None,
            options=CalibrationOptions(),
            fixed={},
            importance=ImportanceMatrix({"x": Importance(np.ones(1), 1)}),
            state=tmp_path / "state",
        )


def test_packings_of_one_width_cannot_be_mixed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing to mix"):
        mix_for_budget(
            random_checkpoint(LLAMA, 1),
            4.5,
            to="safetensors",
            quantization="awq",
            options=CalibrationOptions(),
            fixed={},
            importance=None,
            state=tmp_path / "state",
        )
