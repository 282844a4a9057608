"""Evaluations of real models: what is known of them must come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.convert.convert import convert
from nybble.evaluate.compare import evaluate
from support.evaluations import pages

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

EXACT = ",precision=f32,kv_cache=f32,label=exact"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(pages(), encoding="utf-8")
    return path


def test_fewer_bits_are_further_away(smollm2_path: Path, text: Path, tmp_path: Path) -> None:
    """The fast path, 8 bits and 4 bits of SmolLM2, and its ONNX form in ONNX Runtime."""
    for name in ("q8_0", "q4_0"):
        convert(smollm2_path, tmp_path / f"{name}.gguf", to="gguf", encoding=name, allow_lossy=True)
    convert(smollm2_path, tmp_path / "onnx", to="onnx", encoding="f32")
    models = [f"{smollm2_path}{EXACT}", tmp_path / "onnx@onnxruntime:cpu", smollm2_path]
    models += [tmp_path / "q8_0.gguf", tmp_path / "q4_0.gguf"]
    found = evaluate(models, text=text, window=128, windows=3, repetitions=1, weights=True)
    _, onnx, fast, eight, four = [model.quality for model in found.models]
    assert onnx is not None and onnx.kld is not None and onnx.kld.value < 1e-7
    divergences = [model.quality.kld.value for model in found.others]
    assert divergences == sorted(divergences)
    assert fast.kld.value < 0.001 and eight.kld.value < 0.01 and 0.05 < four.kld.value < 1
    assert fast.top1.value > 0.97 > four.top1.value
    assert four.perplexity_ratio.value > 1.05
    # On the same tokens, the ratio is known far better than either perplexity.
    assert four.perplexity_ratio.error < four.perplexity.error / four.perplexity.value / 2
    sizes = [model.weight_bytes for model in found.models]
    assert sizes[1] > 500e6 > sizes[3] > sizes[2] > sizes[4]
    memory = [model.peak_memory_bytes for model in found.models]
    assert all(peak > size for peak, size in zip(memory, sizes, strict=True))
    worst = max(error.relative_error for error in found.models[4].weight_errors)
    assert 0.05 < worst < 0.2


def test_a_large_vocabulary(gemma3_path: Path, text: Path) -> None:
    """262,144 logits a token, a begin token in every window, sliding windows within."""
    models = [f"{gemma3_path}{EXACT}", gemma3_path]
    found = evaluate(models, text=text, window=512, windows=2, speed=False)
    first, second = (model.quality for model in found.models)
    assert 2 < first.perplexity.value < 200  # much of the text is tables
    assert second.kld.value < 0.001 and second.top1.value > 0.97
