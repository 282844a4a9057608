"""Sensitivities: divergences against another computation, what they predict, and going on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.encodings import encoding
from nybble.errors import FormatError
from nybble.evaluate.measures import measure
from nybble.quantize import sensitivity
from nybble.quantize.sensitivity import Sensitivity, divergence, measure_sensitivities, relative_error
from support.random_checkpoints import LLAMA, random_checkpoint, tokens

CHECKPOINT = random_checkpoint(LLAMA, 3)
WINDOWS = [tokens(24, 1), tokens(24, 2)]
NAMES = [name for name, tensor in CHECKPOINT.tensors.items() if len(tensor.shape) == 2]


def test_divergence_is_what_evaluation_measures() -> None:
    random = np.random.default_rng(0)
    original = (random.standard_normal((40, 1000)) * 4).astype(np.float32)
    other = (original + random.standard_normal((40, 1000)) * 0.3).astype(np.float32)
    expected = measure(original, [other], [0] * 40)[1].kld
    logs = original.copy()
    sensitivity._to_log_probabilities(logs)
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(divergence(logs, other.copy()), expected, rtol=1e-3, atol=2e-6)


def test_every_matrix_gets_a_price() -> None:
    found = measure_sensitivities(CHECKPOINT, WINDOWS, NAMES, None, threads=2)
    assert list(found) == NAMES
    assert all(item.kld >= 0 and 0 < item.error < 0.2 for item in found.values())
    assert max(item.kld for item in found.values()) > 0


def test_a_matrix_that_counts_for_nothing_costs_nothing() -> None:
    """The output of down_proj is added to the stream: 100 times smaller, so is what its error does."""
    name = "model.layers.0.mlp.down_proj.weight"
    before = measure_sensitivities(CHECKPOINT, WINDOWS, NAMES, None, threads=2)[name].kld
    tensor = CHECKPOINT.tensors[name]
    small = (tensor.dequantize() * np.float32(0.01)).reshape(-1)
    changed = tensor.changed(encoding=encoding("f32"), data=small.view(np.uint8))
    weaker = replace(CHECKPOINT, tensors={**CHECKPOINT.tensors, name: changed})
    assert measure_sensitivities(weaker, WINDOWS, NAMES, None, threads=2)[name].kld < before / 10


def test_prices_grow_with_the_squared_error() -> None:
    assert Sensitivity(0.04, 0.03).predicted(0.0075) == pytest.approx(0.01)
    assert Sensitivity(0.04, 0.0).predicted(0.1) == 0


def test_errors_fall_with_bits() -> None:
    tensor = CHECKPOINT.tensors[NAMES[1]]
    errors = [relative_error(tensor, name, None) for name in ("int3_g32_f16", "q4_0", "q5_0", "q8_0", "f16")]
    assert errors == sorted(errors, reverse=True)
    assert relative_error(tensor, "f32", None) == 0


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_sensitivities(CHECKPOINT, WINDOWS, NAMES, None, threads=2)
    state = tmp_path / "state"
    monkeypatch.setattr(sensitivity, "_SAVE_SECONDS", -1.0)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivities(
            CHECKPOINT, WINDOWS, NAMES, None, threads=2, state=state, fingerprint="a", progress=stop
        )
    begun: list[int] = []

    def go_on(fingerprint: str) -> dict[str, Sensitivity]:
        begun.clear()
        return measure_sensitivities(
            CHECKPOINT,
            WINDOWS,
            NAMES,
            None,
            threads=2,
            state=state,
            fingerprint=fingerprint,
            progress=lambda done, total: begun.append(done),
        )

    assert go_on("a") == whole
    assert begun[0] == 4
    go_on("b")
    assert begun[0] == 0, "the state of another job must not be used"


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text('{"fingerprint": "a", "version": 1, "done": {"x": 3}}')
    with pytest.raises(FormatError, match="is damaged"):
        measure_sensitivities(CHECKPOINT, WINDOWS, NAMES, None, state=state, fingerprint="a")
