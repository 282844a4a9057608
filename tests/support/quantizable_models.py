"""Small models on which quantization methods differ as on real ones: correlated inputs, some features large.

Weights drawn at random have inputs that are all alike, for which scales and feedback have nothing to do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.devices.reference import compile_session
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.loading import read_checkpoint
from support.conversions import TOKENS, model_file
from support.random_checkpoints import FULL, GEMMA3, LLAMA, SLIDING, rope, run, tokens

_LARGE = replace(
    LLAMA, hidden_size=128, intermediate_size=192, num_hidden_layers=2, head_dim=32, rope=rope(32)
)
CONFIGS: dict[str, ModelConfig] = {
    "llama": _LARGE,
    "phi3": replace(_LARGE, architecture="phi3"),
    "qwen2": replace(_LARGE, architecture="qwen2", attention_bias=True, tie_word_embeddings=True),
    "qwen3": replace(_LARGE, architecture="qwen3", query_key_norm=True),
    "gemma3": replace(
        GEMMA3,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=2,
        head_dim=32,
        attention_scale=None,
        rope=rope(32, theta=1e6),
        rope_local=rope(32),
        layer_types=(SLIDING, FULL),
        embedding_scale=16.0,
    ),
}
"""Families with separate and fused projections, biases, offsets of norms and tied embeddings.

All of them go into every format."""


def quantizable_model(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    """A GGUF file of float32 weights, with a tokenizer."""
    checkpoint = read_checkpoint(model_file(path, config, weights="f32", embeddings="f32", seed=seed))
    random = np.random.default_rng(seed + 100)
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        values = tensor.dequantize()
        if name == "model.embed_tokens.weight":
            rows, columns = values.shape
            values = random.standard_normal((rows, columns // 8)) @ random.standard_normal(
                (columns // 8, columns)
            )
            values *= 1 / (values.std() * config.embedding_scale)
            values *= 0.2 if config.tie_word_embeddings and config.embedding_scale == 1 else 1
        elif name.endswith(
            ("input_layernorm.weight", "feedforward_layernorm.weight", "attention_layernorm.weight")
        ):
            values = random.lognormal(0, 1, values.shape)
        elif name.endswith(("q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight")):
            values = values * 0.3
        if config.rms_norm_offset and name.endswith("norm.weight"):
            values = np.round(values * 1024) / 1024  # the offset can be subtracted and added, exactly
        data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
        tensors[name] = tensor.changed(data=data)
    again = path.with_suffix(".again")
    write_gguf(replace(checkpoint, tensors=tensors), again)
    again.replace(path)
    return path


def calibration_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """Words of letters by chance, as long as they are in the vocabulary."""
    random = np.random.default_rng(seed)
    letters = [token for token in TOKENS if len(token) == 1 and token.isascii()]
    text = " ".join("".join(random.choice(letters, random.integers(1, 6))) for _ in range(words))
    path.write_text(text, encoding="ascii")
    return path


def logits_of(model: Path | Checkpoint, count: int = 96) -> npt.NDArray[np.float32]:
    """(count, vocabulary) by the reference device for tokens that occur in such texts."""
    checkpoint = read_checkpoint(model) if isinstance(model, Path) else model
    known = [token for token in tokens(3 * count) if token > 3][:count]
    return run(compile_session(checkpoint), known)


def divergence(expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32]) -> float:
    """Mean KL divergence of two sets of logits, in nats."""
    assert expected.shape == actual.shape and np.isfinite(actual).all()
    one, other = (np.float64(part) - np.float64(part).max(1, keepdims=True) for part in (expected, actual))
    one, other = (part - np.log(np.exp(part).sum(1, keepdims=True)) for part in (one, other))
    return float((np.exp(one) * (one - other)).sum(1).mean())
