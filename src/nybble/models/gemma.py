"""Gemma 2 and the text part of Gemma 3: norms before and after each half of a block.

Gemma 2 caps logits with tanh; Gemma 3 normalizes q and k and rotates sliding layers with their
own theta instead. Both are config here.

Sources: arXiv:2408.00118, arXiv:2503.19786, and transformers' ``modeling_gemma2.py`` and
``modeling_gemma3.py``.
"""

from __future__ import annotations

from nybble.checkpoint.config import ModelConfig
from nybble.graph.graph import Graph, GraphBuilder
from nybble.models.layers import asked_rows, attention, embed, gated_mlp, logits, norm


def build(config: ModelConfig, builder: GraphBuilder) -> Graph:
    """Decoder with four norms a block."""
    x = embed(builder, config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = norm(builder, config, x, f"{prefix}.input_layernorm")
        h = attention(builder, config, layer, h)
        h = norm(builder, config, h, f"{prefix}.post_attention_layernorm")
        x = builder.add(asked_rows(builder, config, layer, x), h)
        h = norm(builder, config, x, f"{prefix}.pre_feedforward_layernorm")
        h = gated_mlp(builder, config, layer, h)
        h = norm(builder, config, h, f"{prefix}.post_feedforward_layernorm")
        x = builder.add(x, h)
    return builder.finish(logits(builder, config, x))
