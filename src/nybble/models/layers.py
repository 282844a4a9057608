"""The parts that several model families share: embedding, norm, attention, gated MLP, logits.

A family's file puts them in order. Names of weights are Hugging Face's.
"""

from __future__ import annotations

from nybble.checkpoint.config import ModelConfig
from nybble.errors import FormatError
from nybble.graph.graph import GraphBuilder, Value


def embed(builder: GraphBuilder, config: ModelConfig) -> Value:
    """Token embeddings: (tokens, hidden_size)."""
    scale = config.embedding_scale
    x = builder.embedding("model.embed_tokens.weight", scale=scale)
    if builder.has("model.embed_tokens.adapters.a"):
        changes = builder.embedding("model.embed_tokens.adapters.a", scale=scale)
        x = _with_changes(builder, x, changes, "model.embed_tokens")
    return _expect(x, config.hidden_size, "model.embed_tokens.weight")


def norm(
    builder: GraphBuilder, config: ModelConfig, x: Value, name: str, *, group: int | None = None
) -> Value:
    """RMS norm with the weight ``name``.weight."""
    return builder.rms_norm(
        x, f"{name}.weight", eps=config.rms_norm_eps, offset=config.rms_norm_offset, group=group
    )


def attention(builder: GraphBuilder, config: ModelConfig, layer: int, x: Value) -> Value:
    """Self-attention with separate q, k and v projections.

    Returns (tokens, hidden_size); in the last layer only the rows whose logits are asked for.
    """
    prefix = f"model.layers.{layer}.self_attn"
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    q, k, v = (
        _projection(builder, x, f"{prefix}.{name}_proj", width, config.attention_bias)
        for name, width in (("q", query_width), ("k", key_width), ("v", key_width))
    )
    if config.query_key_norm:
        q = norm(builder, config, q, f"{prefix}.q_norm", group=config.head_dim)
        k = norm(builder, config, k, f"{prefix}.k_norm", group=config.head_dim)
    return attend(builder, config, layer, (q, k, v))


def fused_attention(builder: GraphBuilder, config: ModelConfig, layer: int, x: Value) -> Value:
    """Self-attention whose q, k and v are one projection (Phi-3); returns as ``attention`` does."""
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    name = f"model.layers.{layer}.self_attn.qkv_proj"
    qkv = _projection(builder, x, name, query_width + 2 * key_width, config.attention_bias)
    q, k, v = builder.split(qkv, (query_width, key_width, key_width))
    return attend(builder, config, layer, (q, k, v))


def attend(builder: GraphBuilder, config: ModelConfig, layer: int, qkv: tuple[Value, Value, Value]) -> Value:
    """Rotary embedding, attention over the cache, output projection."""
    q, k, v = qkv
    head_dim = config.head_dim
    rope = config.layer_rope(layer)
    scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    attended = builder.attention(
        builder.rotary(q, head_dim=head_dim, rope=rope),
        builder.rotary(k, head_dim=head_dim, rope=rope),
        v,
        layer=layer,
        head_dim=head_dim,
        scale=scale,
        window=config.layer_window(layer),
        softcap=config.attention_softcap,
    )
    attended = asked_rows(builder, config, layer, attended)
    name = f"model.layers.{layer}.self_attn.o_proj"
    return _projection(builder, attended, name, config.hidden_size, config.attention_output_bias)


def gated_mlp(builder: GraphBuilder, config: ModelConfig, layer: int, x: Value) -> Value:
    """down(activation(gate(x)) * up(x)) with separate gate and up projections."""
    prefix = f"model.layers.{layer}.mlp"
    size, bias = config.intermediate_size, config.mlp_bias
    gate = _projection(builder, x, f"{prefix}.gate_proj", size, bias)
    up = _projection(builder, x, f"{prefix}.up_proj", size, bias)
    hidden = builder.gated_activation(gate, up, config.hidden_act)
    return _projection(builder, hidden, f"{prefix}.down_proj", config.hidden_size, bias)


def fused_gated_mlp(builder: GraphBuilder, config: ModelConfig, layer: int, x: Value) -> Value:
    """The same with gate and up as one projection, gate first (Phi-3)."""
    prefix = f"model.layers.{layer}.mlp"
    size, bias = config.intermediate_size, config.mlp_bias
    gate_up = _projection(builder, x, f"{prefix}.gate_up_proj", 2 * size, bias)
    gate, up = builder.split(gate_up, (size, size))
    hidden = builder.gated_activation(gate, up, config.hidden_act)
    return _projection(builder, hidden, f"{prefix}.down_proj", config.hidden_size, bias)


def asked_rows(builder: GraphBuilder, config: ModelConfig, layer: int, x: Value) -> Value:
    """``x``, but in the last layer only the rows whose logits the batch asks for.

    After the last attention no row looks at another one, so the rest of that layer need not run
    for the other rows: a prompt then costs almost a layer less.
    """
    return builder.select_rows(x) if layer == config.num_hidden_layers - 1 else x


def logits(builder: GraphBuilder, config: ModelConfig, x: Value) -> Value:
    """Final norm and output projection: (rows asked for, vocab_size)."""
    x = norm(builder, config, x, "model.norm")
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    x = _expect(_linear(builder, x, name, module="lm_head"), config.vocab_size, name)
    return builder.softcap(builder.scale(x, config.logit_scale), config.logit_softcap)


def _projection(builder: GraphBuilder, x: Value, name: str, width: int, bias: bool) -> Value:
    y = _linear(builder, x, f"{name}.weight", f"{name}.bias" if bias else None)
    return _expect(y, width, f"{name}.weight")


def _linear(
    builder: GraphBuilder, x: Value, weight: str, bias: str | None = None, module: str | None = None
) -> Value:
    """A linear whose weight's columns may lie in another order (GPTQ with act-order), with its adapters.

    ``module``: whose adapters; None: those of the weight's.
    """
    module = weight.removesuffix(".weight") if module is None else module
    permutation = weight.removesuffix("weight") + "input_permutation"
    gathered = builder.gather_columns(x, permutation) if builder.has(permutation) else x
    y = builder.linear(gathered, weight, bias)
    if not builder.has(f"{module}.adapters.a"):
        return y
    return _with_changes(builder, y, builder.linear(x, f"{module}.adapters.a"), module)


def _with_changes(builder: GraphBuilder, y: Value, inner: Value, module: str) -> Value:
    """y + B(inner), each adapter at its weight; ``inner`` is A(x). See ``checkpoint/apply_adapters.py``."""
    prefix = f"{module}.adapters"
    inner = builder.scale_by_sequence(inner, f"{prefix}.slots", f"{prefix}.scales")
    return builder.add(y, builder.linear(inner, f"{prefix}.b"))


def _expect(x: Value, width: int, name: str) -> Value:
    if x.width != width:
        raise FormatError(f"{name}: gives {x.width} features, but the config says {width}")
    return x
