"""Llama and what differs from it by config only: Mistral, SmolLM2, SmolLM3, Qwen2, Qwen3.

Sources: Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783), Mistral 7B (arXiv:2310.06825),
Qwen2 (arXiv:2407.10671), Qwen3 (arXiv:2505.09388), and transformers' ``modeling_llama.py``.
"""

from __future__ import annotations

from nybble.checkpoint.config import ModelConfig
from nybble.graph.graph import Graph, GraphBuilder
from nybble.models.layers import asked_rows, attention, embed, gated_mlp, logits, norm


def build(config: ModelConfig, builder: GraphBuilder) -> Graph:
    """Pre-norm decoder: attention and a gated MLP, each added to the residual stream."""
    x = embed(builder, config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = norm(builder, config, x, f"{prefix}.input_layernorm")
        h = attention(builder, config, layer, h)
        x = builder.add(asked_rows(builder, config, layer, x), builder.scale(h, config.residual_scale))
        h = norm(builder, config, x, f"{prefix}.post_attention_layernorm")
        h = gated_mlp(builder, config, layer, h)
        x = builder.add(x, builder.scale(h, config.residual_scale))
    return builder.finish(logits(builder, config, x))
