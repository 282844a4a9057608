"""Both forms of ONNX against the reference device on models of random shapes and switches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.config import LayerType, ModelConfig
from nybble.devices.reference import compile_session
from nybble.formats.onnx.write import write_onnx_folder
from support.onnx_runs import quantized, run_steps, session
from support.random_checkpoints import LLAMA, random_checkpoint, relative_error, rope, run, tokens

KINDS: tuple[LayerType, ...] = ("sliding_attention", "full_attention")


def random_config(seed: int) -> ModelConfig:
    random = np.random.default_rng(seed)

    def one(*choices: int) -> int:
        return int(random.choice(choices))

    key_heads, head_dim, layers = one(1, 2, 3), one(16, 32, 48, 80), one(1, 2, 3)
    rotary_dim = head_dim if random.random() < 0.6 else 16
    architecture = str(random.choice(["llama", "phi3", "gemma2", "qwen3"]))
    hidden = one(32, 48, 96)
    return replace(
        LLAMA,
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=one(32, 80, 160),
        num_hidden_layers=layers,
        num_key_value_heads=key_heads,
        num_attention_heads=key_heads * one(1, 2, 5),
        head_dim=head_dim,
        rope=rope(head_dim, rotary_dim=rotary_dim, theta=float(one(500, 10000))),
        hidden_act=str(random.choice(["silu", "gelu", "gelu_pytorch_tanh"])),
        rms_norm_eps=float(random.choice([1e-6, 1e-3])),
        tie_word_embeddings=bool(random.random() < 0.5),
        attention_bias=bool(random.random() < 0.5),
        mlp_bias=bool(random.random() < 0.3),
        query_key_norm=architecture == "qwen3" or (architecture == "llama" and random.random() < 0.3),
        sliding_window=one(1, 3, 8),
        layer_types=tuple(KINDS[one(0, 1)] for _ in range(layers)),
        attention_scale=float(random.choice([0.1, 0.3])) if random.random() < 0.5 else None,
        attention_softcap=2.0 if random.random() < 0.5 else None,
        logit_softcap=3.0 if random.random() < 0.3 else None,
        embedding_scale=hidden**0.5 if random.random() < 0.3 else 1.0,
        residual_scale=0.7 if architecture == "llama" and random.random() < 0.5 else 1.0,
    )


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-dml-int4", "onnx-portable"])
@pytest.mark.parametrize("seed", range(12))
def test_logits(seed: int, target: str, tmp_path: Path) -> None:
    """float weights throughout; the DirectML graph too, where int4 weights come from the checkpoint."""
    config = random_config(seed)
    dml = target == "onnx-dml-int4"
    checkpoint = random_checkpoint(config, seed=seed)
    if dml:
        checkpoint = quantized(checkpoint, "int4_g16_f16_z", layers_only=True)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    ids = tokens(14, seed=seed)
    expected = run(compile_session(checkpoint), ids)
    actual = run_steps(session(tmp_path), config, ids, (9, 1, 1))
    assert relative_error(actual, expected) < (2e-2 if dml else 1e-5)
