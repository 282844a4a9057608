"""Statistics against transformers: hooks on the linears of a small random model of every family."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from nybble.quantize.layer_runner import LayerRunner  # noqa: E402
from nybble.quantize.statistics import InputStatistics  # noqa: E402
from support.model_cases import CASES  # noqa: E402
from support.random_models import checkpoint_of, oracle, random_model, tokens  # noqa: E402

pytestmark = pytest.mark.oracle

CHOSEN = (
    "llama-grouped-tied",
    "llama-biases",
    "mistral-window",
    "smollm3",
    "qwen2",
    "qwen3",
    "phi3-mini-4k",
    "phi3-longrope",
    "phi4-mini",
    "gemma2",
    "gemma3",
)


@pytest.mark.parametrize("case", CHOSEN)
def test_sums_are_those_of_transformers(case: str) -> None:
    model_type, switches = CASES[case]
    model = random_model(model_type, **switches)
    windows = [tokens(40, 1), tokens(25, 2), tokens(12, 3)]
    expected: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(module: object, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                expected.setdefault(f"{name}.weight", []).append(inputs[0][0].double().numpy())

            module.register_forward_pre_hook(hook)
    for window in windows:
        oracle(model, window)
    checkpoint = checkpoint_of(model)
    if checkpoint.config.tie_word_embeddings:
        expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    found: dict[str, InputStatistics] = {}
    with LayerRunner(checkpoint, windows, precision="f32") as runner:
        for layer in range(runner.num_layers):
            found.update(runner.collect(layer, hessian=True, advance=True))
        found.update(runner.collect(runner.num_layers, hessian=True))
    assert set(found) == set(expected)
    for name, rows in expected.items():
        x, seen = np.concatenate(rows), found[name]
        assert seen.hessian is not None
        for actual, wanted in (
            (seen.sum_squares, (x**2).sum(0)),
            (seen.sum_absolute, np.abs(x).sum(0)),
            (seen.hessian, x.T @ x),
        ):
            assert np.abs(actual - wanted).max() < 1e-4 * np.abs(wanted).max(), name
