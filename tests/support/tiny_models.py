"""Tiny random checkpoints without torch: for tests of devices and of generation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY, HEAD_DIM = 32, 48, 50, 8

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    max_position_embeddings=64,
    rope=RopeConfig(theta=10000.0, rotary_dim=HEAD_DIM),
    tie_word_embeddings=True,
)
PHI3 = replace(
    LLAMA,
    architecture="phi3",
    rope=RopeConfig(
        theta=10000.0,
        rotary_dim=HEAD_DIM,
        kind="longrope",
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(1.0, 3.0, 7.0, 20.0),
    ),
)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a llama or phi3 config."""
    hidden, size = config.hidden_size, config.intermediate_size
    query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.o_proj": (hidden, query),
        "mlp.down_proj": (hidden, size),
    }
    if config.architecture == "phi3":
        parts |= {"self_attn.qkv_proj": (query + 2 * key, hidden), "mlp.gate_up_proj": (2 * size, hidden)}
    else:
        parts |= {f"self_attn.{n}_proj": (query if n == "q" else key, hidden) for n in "qkv"}
        parts |= {f"mlp.{n}_proj": (size, hidden) for n in ("gate", "up")}
    for layer in range(config.num_hidden_layers):
        result |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return result


def tiny_checkpoint(config: ModelConfig = LLAMA, seed: int = 0) -> Checkpoint:
    """Random float32 weights for the config."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        values = (
            random.standard_normal(shape) * (1.5 / shape[-1] ** 0.5) if len(shape) == 2 else np.ones(shape)
        )
        data = values.astype(np.float32).reshape(-1).view(np.uint8)
        tensors[name] = Tensor(name, shape, encoding("f32"), data)
    return Checkpoint(config, tensors, name="tiny")
