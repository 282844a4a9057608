"""Evaluations that nobody computed, and texts for the tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nybble.evaluate.benchmark import Measurement
from nybble.evaluate.estimates import Estimate
from nybble.evaluate.results import Evaluation, Flip, ModelResult, Quality
from nybble.evaluate.weights import WeightError

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'\x1b[31m\u202e"


def random_text(words: int, seed: int = 0) -> str:
    """Words of letters that ``conversions.TOKENS`` has."""
    random = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return " ".join("".join(random.choice(letters, random.integers(1, 6))) for _ in range(words))


def pages() -> str:
    """English with some code in it: this project's documentation."""
    folder = Path(__file__).resolve().parents[2] / "docs"
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md")))


def made_up_evaluation(models: int = 3, label: str = "") -> Evaluation:
    """An evaluation with everything in it; ``label`` is added to all text."""
    flips = tuple(
        Flip(
            1000 + i,
            f"and then the{label}",
            f" cat{label}",
            " dog\n",
            f" c{label}",
            0.9 - i / 10,
            0.05,
            0.5,
            0.3,
        )
        for i in range(3)
    )

    def result(index: int) -> ModelResult:
        kld = 0.0004 * 12**index
        quality = Quality(
            tokens=20_400,
            perplexity=Estimate(20.0 + index, 0.3),
            perplexity_ratio=Estimate(1 + index / 20, 0.001) if index else None,
            kld=Estimate(kld, kld / 40) if index else None,
            kld_median=Estimate(kld / 3, kld / 50) if index else None,
            kld99=Estimate(kld * 9, kld / 4) if index else None,
            kld_max=kld * 50 if index else None,
            top1=Estimate(1 - 0.05 * index, 0.002) if index else None,
            flips=1020 * index if index else None,
        )
        errors = tuple(
            WeightError(
                f"model.layers.{layer}.{kind}.weight",
                layer,
                kind,
                0.02 * index * (1 + layer % 3),
                "q4_k",
                "f16",
            )
            for layer in range(30)
            for kind in ("self_attn.q_proj", "mlp.down_proj", f"odd{label}")
        )
        errors += (
            WeightError("model.embed_tokens.weight", None, "model.embed_tokens", 0.004, "q6_k", "f16"),
        )
        return ModelResult(
            label=("f16.gguf", "q4_k_m.gguf", "int4-awq")[index % 3] + label,
            model=f"models/{index}{label}",
            path=f"/models/{index}{label}",
            device="cpu" if index < 2 else "onnxruntime:cpu",
            format="gguf",
            options={"precision": f"fast{label}"} if index else {},
            threads=2,
            weight_bytes=270_000_000 // (1 + index),
            parameters=134_515_008,
            load_seconds=0.4,
            quality=quality,
            flips=flips if index else (),
            prefill=Measurement("prefill", 512, 0, (0.25, 0.26, 0.3)),
            decode=Measurement("decode", 64, 0, (0.5 / (1 + index), 0.6 / (1 + index))),
            peak_memory_bytes=400_000_000,
            weight_errors=errors if index else (),
            notes=(f"a note{label}",) if index else (),
        )

    return Evaluation(
        text=f"wiki.txt{label}",
        text_sha256="0" * 64,
        tokens=41_000,
        window=512,
        stride=None,
        windows=80,
        scored=20_400,
        models=tuple(map(result, range(models))),
        processor=f"a processor{label}",
        load_average=0.5,
        version="0.1.0",
        seconds=100.0,
    )
