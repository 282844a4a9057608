"""Phi-3, Phi-3.5 and Phi-4-mini: Llama's block with fused projections.

q, k and v are one matrix and so are gate and up. The 128k models scale rotary positions with
LongRoPE; Phi-4-mini rotates three quarters of each head and ties its embeddings: config, all of it.

Sources: arXiv:2404.14219, arXiv:2503.01743, and transformers' ``modeling_phi3.py``.
"""

from __future__ import annotations

from nybble.checkpoint.config import ModelConfig
from nybble.graph.graph import Graph, GraphBuilder
from nybble.models.layers import asked_rows, embed, fused_attention, fused_gated_mlp, logits, norm


def build(config: ModelConfig, builder: GraphBuilder) -> Graph:
    """Pre-norm decoder with fused qkv_proj and gate_up_proj."""
    x = embed(builder, config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = norm(builder, config, x, f"{prefix}.input_layernorm")
        h = fused_attention(builder, config, layer, h)
        x = builder.add(asked_rows(builder, config, layer, x), h)
        h = norm(builder, config, x, f"{prefix}.post_attention_layernorm")
        x = builder.add(x, fused_gated_mlp(builder, config, layer, h))
    return builder.finish(logits(builder, config, x))
