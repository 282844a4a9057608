"""LayerRunner against the reference device: sums of every family, windows that do not see each other,
replaced weights, cancelling."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import Cancelled, FormatError, NybbleError, UnsupportedError
from nybble.quantize import hidden_states
from nybble.quantize.layer_runner import LayerRunner, mirror
from nybble.quantize.statistics import InputStatistics, Statistics
from support.linear_inputs import linear_inputs
from support.random_checkpoints import FAMILIES, LLAMA, random_checkpoint, tokens, with_tensors

WINDOWS = [tokens(60, 1), tokens(33, 2), tokens(1, 3), tokens(60, 4)]
"""For LongRoPE some are longer than the length from which on it takes the long divisors."""
EXACT = 2e-5


def collected(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]] = WINDOWS,
    *,
    hessian: bool = True,
    together: bool = True,
    precision: str = "f32",
) -> dict[str, InputStatistics]:
    """The statistics of all layers; ``together``: collect and advance in one run."""
    found: dict[str, InputStatistics] = {}
    with LayerRunner(checkpoint, windows, threads=2, precision=precision) as runner:
        for layer in range(runner.num_layers):
            found.update(runner.collect(layer, hessian=hessian, advance=together))
            if not together:
                runner.advance(layer)
        found.update(runner.collect(runner.num_layers, hessian=hessian))
    return found


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check(found: Statistics, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], bound: float) -> None:
    """Every sum of every linear against those over what the reference device's linears read."""
    expected = linear_inputs(checkpoint, windows)
    assert set(found) == set(expected)
    for name, x in expected.items():
        seen = found[name]
        assert seen.tokens == len(x) and seen.in_features == x.shape[1]
        assert relative(seen.sum_squares, (x**2).sum(0)) < bound, name
        assert relative(seen.sum_absolute, np.abs(x).sum(0)) < bound, name
        if seen.hessian is not None:
            assert seen.hessian.dtype == np.float32
            assert relative(seen.hessian, x.T @ x) < bound, name
            assert np.array_equal(seen.hessian, seen.hessian.T), name


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_reference(family: str) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    check(collected(checkpoint), checkpoint, WINDOWS, EXACT)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_fast_sums_differ_by_rounding_only(family: str) -> None:
    # As in test_cpu_parity: half a percent for each linear passed, three times that allowed.
    checkpoint = random_checkpoint(FAMILIES[family], weights="q8_0" if family == "llama" else "f32")
    bound = 3 * 2 * 0.005 * (4 * checkpoint.config.num_hidden_layers) ** 0.5
    check(collected(checkpoint, precision="fast"), checkpoint, WINDOWS, bound)


def test_collecting_and_advancing_in_one_run_or_two_is_the_same() -> None:
    checkpoint = random_checkpoint(FAMILIES["gemma3"])
    one, two = collected(checkpoint), collected(checkpoint, together=False)
    for name, seen in one.items():
        assert np.array_equal(seen.sum_squares, two[name].sum_squares), name
        assert np.array_equal(seen.hessian, two[name].hessian), name


def test_hidden_states_are_those_of_the_reference() -> None:
    checkpoint = random_checkpoint(LLAMA)
    with LayerRunner(checkpoint, WINDOWS, precision="f32") as runner:
        for layer in range(runner.num_layers):
            runner.advance(layer)
        x = runner.hidden.astype(np.float64)
    norm = checkpoint.tensors["model.norm.weight"].dequantize()
    normal = x / np.sqrt((x**2).mean(1, keepdims=True) + LLAMA.rms_norm_eps) * norm
    expected = linear_inputs(checkpoint, WINDOWS)["lm_head.weight"]
    assert relative(normal, expected) < EXACT


def test_linears_with_the_same_input_share_their_statistics() -> None:
    found = collected(random_checkpoint(LLAMA))
    prefix = "model.layers.1."
    q, k, v = (found[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv")
    assert q is k and k is v
    gate, up = (found[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert gate is up and gate is not q


def test_windows_do_not_see_each_other() -> None:
    checkpoint = random_checkpoint(LLAMA)
    whole = collected(checkpoint)
    parts = [collected(checkpoint, [window]) for window in WINDOWS]
    for name, seen in whole.items():
        total = np.sum([part[name].sum_squares for part in parts], axis=0)
        assert relative(seen.sum_squares, total) < 1e-6, name


def test_without_hessian_there_is_none_and_the_sums_are_the_same() -> None:
    checkpoint = random_checkpoint(LLAMA)
    with_it, without = collected(checkpoint), collected(checkpoint, hessian=False)
    for name, seen in without.items():
        assert seen.hessian is None
        assert np.array_equal(seen.sum_squares, with_it[name].sum_squares)


def test_some_linears_alone() -> None:
    checkpoint = random_checkpoint(LLAMA)
    name = "model.layers.0.self_attn.o_proj.weight"
    with LayerRunner(checkpoint, WINDOWS) as runner:
        assert runner.linears(0)[0] == "model.layers.0.self_attn.q_proj.weight"
        assert runner.linears(runner.num_layers) == ("lm_head.weight",)
        found = runner.collect(0, hessian=True, weights=[name])
        assert set(found) == {name}
        assert runner.layer == 0
        with pytest.raises(ValueError, match=r"layer 0 has no linear lm_head\.weight"):
            runner.collect(0, hessian=False, weights=["lm_head.weight"])


def test_inputs_that_are_gathered_are_summed_in_the_weights_order() -> None:
    checkpoint = random_checkpoint(FAMILIES["phi3"])
    random = np.random.default_rng(5)
    order = random.permutation(96).astype("<i4")
    name = "model.layers.1.mlp.down_proj.input_permutation"
    permuted = Tensor(name, (96,), encoding("i32"), order.view(np.uint8))
    changed = with_tensors(checkpoint, {name: permuted})
    found = collected(changed)
    check(found, changed, WINDOWS, EXACT)
    plain = linear_inputs(checkpoint, WINDOWS)["model.layers.1.mlp.down_proj.weight"]
    seen = found["model.layers.1.mlp.down_proj.weight"]
    assert relative(seen.sum_squares, (plain**2).sum(0)[order]) < EXACT


def test_replaced_weights_are_used_from_then_on() -> None:
    checkpoint = random_checkpoint(LLAMA)
    other = random_checkpoint(LLAMA, seed=9)
    names = [name for name in checkpoint.tensors if name.startswith("model.layers.0.mlp.")]
    changed = {name: other.tensors[name] for name in names}
    expected = collected(with_tensors(checkpoint, changed))
    found: dict[str, InputStatistics] = {}
    with LayerRunner(checkpoint, WINDOWS, precision="f32") as runner:
        found.update(runner.collect(0, hessian=True))
        runner.replace(changed)
        found.update(runner.collect(0, hessian=True))
        runner.advance(0)
        for layer in (1, 2):
            found.update(runner.collect(layer, hessian=True, advance=True))
        found.update(runner.collect(3, hessian=True))
    for name, seen in expected.items():
        assert np.array_equal(seen.hessian, found[name].hessian), name


def test_a_replacement_that_does_not_fit_is_refused_and_forgotten() -> None:
    checkpoint = random_checkpoint(LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = Tensor(name, (96, 32), encoding("f32"), np.zeros(96 * 32 * 4, np.uint8))
    with LayerRunner(checkpoint, WINDOWS) as runner:
        with pytest.raises(FormatError, match="up_proj"):
            runner.replace({name: wrong})
        runner.advance(0)


def test_hidden_states_in_a_file_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(LLAMA)
    expected = collected(checkpoint)
    monkeypatch.setattr(hidden_states.HiddenStates.__init__, "__kwdefaults__", {"folder": None, "limit": 0})
    with LayerRunner(checkpoint, WINDOWS, folder=tmp_path, precision="f32") as runner:
        assert runner._hidden.is_mapped
        for layer in range(3):
            found = runner.collect(layer, hessian=True, advance=True)
            for name, seen in found.items():
                assert np.array_equal(seen.hessian, expected[name].hessian), name
    assert not list(tmp_path.iterdir())


def test_only_the_layer_at_hand_can_run() -> None:
    with LayerRunner(random_checkpoint(LLAMA), WINDOWS) as runner:
        with pytest.raises(ValueError, match="layer 1 cannot run: the hidden states at hand are those of 0"):
            runner.collect(1, hessian=False)
        with pytest.raises(ValueError, match="layer 4 cannot run"):
            runner.advance(4)
        with pytest.raises(ValueError, match="layers 0 to 2, not 4"):
            runner.linears(4)
        for layer in range(3):
            runner.advance(layer)
        with pytest.raises(ValueError, match="nothing follows the output matrix"):
            runner.advance(3)


def test_states_can_be_restored() -> None:
    checkpoint = random_checkpoint(LLAMA)
    with LayerRunner(checkpoint, WINDOWS) as first, LayerRunner(checkpoint, WINDOWS) as second:
        first.advance(0)
        second.restore(1, first.hidden.copy())
        one, two = first.collect(1, hessian=True), second.collect(1, hessian=True)
        for name, seen in one.items():
            assert np.array_equal(seen.hessian, two[name].hessian)
        with pytest.raises(ValueError, match="do not fit"):
            second.restore(1, first.hidden[:-1])


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "there are no windows"),
        ([[1], []], "window 1 has 0 tokens; the model takes 1 to 512"),
        ([[1] * 513], "window 0 has 513 tokens"),
        ([[1, 101]], r"window 0 has a token outside 0 \.\. 100"),
        ([[-1]], "window 0 has a token outside"),
    ],
)
def test_windows_that_cannot_run_are_refused(windows: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerRunner(random_checkpoint(LLAMA), windows)


def test_adapters_are_refused() -> None:
    checkpoint = replace(random_checkpoint(LLAMA), adapters=("pirate",))
    with pytest.raises(UnsupportedError, match=r"LoRA adapters beside its weights \(pirate\): merge"):
        LayerRunner(checkpoint, WINDOWS)


def test_weights_that_are_not_finite_are_found() -> None:
    checkpoint = random_checkpoint(LLAMA)
    name = "model.layers.0.input_layernorm.weight"
    broken = checkpoint.tensors[name].changed(data=np.full(64, np.nan, np.float32).view(np.uint8))
    with (
        LayerRunner(with_tensors(checkpoint, {name: broken}), WINDOWS) as runner,
        pytest.raises(NybbleError, match=r"layer 0: the input of .* is not finite"),
    ):
        runner.collect(0, hessian=False)


def test_cancelling_stops_and_mixed_states_are_refused() -> None:
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        assert total == runner.tokens
        if len(calls) == 2:
            thread = threading.Thread(target=runner.cancel)
            thread.start()
            thread.join()

    windows = [tokens(400, seed) for seed in range(30)]
    with LayerRunner(random_checkpoint(LLAMA), windows, progress=progress) as runner:
        with pytest.raises(Cancelled):
            runner.advance(0)
        assert len(calls) == 2 and calls == sorted(calls)
        with pytest.raises(NybbleError, match="stopped halfway"):
            runner.advance(0)
    with LayerRunner(random_checkpoint(LLAMA), WINDOWS) as runner:
        runner.cancel()
        with pytest.raises(Cancelled):
            runner.collect(0, hessian=False)
        assert runner.collect(0, hessian=False)


def test_mirror_copies_what_is_above_the_diagonal() -> None:
    random = np.random.default_rng(0)
    for n in (1, 5, 1024, 1500):
        values = random.standard_normal((n, n)).astype(np.float32)
        expected = np.triu(values) + np.triu(values, 1).T
        mirror(values)
        assert np.array_equal(values, expected)
