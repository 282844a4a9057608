"""GGUF metadata to ModelConfig: the keys that all architectures share, and a row for each one's own.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's
``gguf-py/gguf/constants.py``. ``convert_hf_to_gguf.py`` there says what is written for each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nybble.checkpoint.config import LayerType, ModelConfig, RopeConfig
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.fields import Fields

MAX_LAYERS = 4096


@dataclass(frozen=True)
class Architecture:
    """What one ``general.architecture`` has of its own."""

    permuted: bool = False
    """q and k rows are permuted so that rotary pairs features 2i and 2i + 1."""
    hidden_act: str = "silu"
    adjust: Callable[[ModelConfig, Fields], ModelConfig] | None = None
    """Last changes to the config, from keys or from rules that only this family has."""


def read_config(metadata: Mapping[str, object], tensors: Mapping[str, Tensor], where: str) -> ModelConfig:
    """The config of a GGUF file.

    ``tensors`` are keyed by GGUF names; sizes that the metadata leaves out come from their shapes.

    Raises:
        FormatError: a key is missing, of the wrong type or out of range; the message names it.
        UnsupportedError: an architecture that is not known, or a feature that it does not have here.
    """
    architecture = Fields(metadata, where).string("general.architecture")
    row = ARCHITECTURES.get(architecture)
    if row is None:
        raise UnsupportedError(
            f"{where}: unknown model architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    fields = Fields(metadata, where, f"{architecture}.")
    if fields.integer("expert_count", 0, minimum=0):
        raise UnsupportedError(f"{where}: {architecture}.expert_count: mixture of experts is not supported")
    layers = fields.integer("block_count", maximum=MAX_LAYERS)
    _check_layers(tensors, layers, fields)
    hidden_size = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count", maximum=hidden_size)
    head_dim = _head_dim(fields, hidden_size, heads)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_rows(tensors, "token_embd.weight", where),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("attention.head_count_kv", heads, maximum=heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("context_length"),
        rope=_rope(fields, tensors, head_dim, row.permuted),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", maximum=1.0),
        hidden_act=row.hidden_act,
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        attention_output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        query_key_norm="blk.0.attn_q_norm.weight" in tensors,
        attention_scale=fields.number("attention.scale", 0.0) or None,
        logit_scale=fields.positive("logit_scale", 1.0),
        embedding_scale=fields.positive("embedding_scale", 1.0),
        residual_scale=fields.positive("residual_scale", 1.0),
    )
    config = _every_layer_slides(config, fields)
    return config if row.adjust is None else row.adjust(config, fields)


def _check_layers(tensors: Mapping[str, Tensor], layers: int, fields: Fields) -> None:
    """The number of layers must be the number that has tensors: not more, not fewer."""
    if f"blk.{layers - 1}.attn_norm.weight" not in tensors or f"blk.{layers}.attn_norm.weight" in tensors:
        raise fields.error(
            "block_count", f"is {layers}, but the file has tensors of another number of layers"
        )


def _rows(tensors: Mapping[str, Tensor], name: str, where: str) -> int:
    tensor = tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise FormatError(f"{where}: the matrix {name} is missing")
    return tensor.shape[0]


def _head_dim(fields: Fields, hidden_size: int, heads: int) -> int:
    if fields.has("attention.key_length"):
        head_dim = fields.integer("attention.key_length", maximum=65536)
    elif hidden_size % heads:
        raise fields.error("attention.head_count", f"is {heads}, which does not divide {hidden_size}")
    else:
        head_dim = hidden_size // heads
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", f"differs from the key length {head_dim}")
    return head_dim


# -- rotary embedding --------------------------------------------------------------------------------


def _rope(fields: Fields, tensors: Mapping[str, Tensor], head_dim: int, interleaved: bool) -> RopeConfig:
    """The rotary embedding; which scaling it has is told by a key or by the tensors that it needs."""
    rotary_dim = fields.integer("rope.dimension_count", head_dim, minimum=2, maximum=head_dim)
    if rotary_dim % 2:
        raise fields.error("rope.dimension_count", f"is {rotary_dim}; it must be even")
    rope = RopeConfig(
        theta=fields.positive("rope.freq_base", 10000.0),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        frequency_factors=_divisors(tensors, "rope_freqs.weight", rotary_dim, fields),
    )
    return _SCALINGS[_scaling_kind(fields, tensors)](rope, fields, tensors)


def _scaling_kind(fields: Fields, tensors: Mapping[str, Tensor]) -> str:
    """``rope.scaling.type``; files of Phi-3 do not name it, but hold longrope's tensors."""
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        return "longrope"
    has_factor = fields.has("rope.scaling.factor") or fields.has("rope.scale_linear")
    kind = fields.string("rope.scaling.type", "linear" if has_factor else "none")
    if kind not in _SCALINGS:
        raise fields.unsupported("rope.scaling.type", f"is {kind!r}; known: {', '.join(_SCALINGS)}")
    return kind


def _linear(rope: RopeConfig, fields: Fields, tensors: Mapping[str, Tensor]) -> RopeConfig:
    # rope.scale_linear is the key's name in files of 2023.
    key = "rope.scaling.factor" if fields.has("rope.scaling.factor") else "rope.scale_linear"
    return replace(rope, kind="linear", factor=fields.positive(key, 1.0))


def _yarn(rope: RopeConfig, fields: Fields, tensors: Mapping[str, Tensor]) -> RopeConfig:
    factor = fields.positive("rope.scaling.factor")
    # llama.cpp multiplies its own 1 + 0.1 ln(factor) by this key.
    multiplier = fields.positive(
        "rope.scaling.attn_factor", fields.positive("rope.scaling.yarn_attn_factor", 1.0)
    )
    prescribed = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return replace(
        rope,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
        attention_factor=multiplier * prescribed,
        beta_fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
    )


def _longrope(rope: RopeConfig, fields: Fields, tensors: Mapping[str, Tensor]) -> RopeConfig:
    context = fields.integer("context_length")
    original = fields.integer("rope.scaling.original_context_length", maximum=context)
    return replace(
        rope,
        kind="longrope",
        factor=context / original,
        original_max_position_embeddings=original,
        short_factor=_divisors(tensors, "rope_factors_short.weight", rope.rotary_dim, fields, required=True),
        long_factor=_divisors(tensors, "rope_factors_long.weight", rope.rotary_dim, fields, required=True),
        attention_factor=fields.number("rope.scaling.attn_factor", None) or None,
    )


_SCALINGS: Mapping[str, Callable[[RopeConfig, Fields, Mapping[str, Tensor]], RopeConfig]] = {
    "none": lambda rope, fields, tensors: rope,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""``rope.scaling.type``. llama3's scaling has no name here: ``rope_freqs.weight`` holds its result."""


def _divisors(
    tensors: Mapping[str, Tensor], name: str, rotary_dim: int, fields: Fields, *, required: bool = False
) -> tuple[float, ...]:
    """One divisor for each pair of rotated features; empty where the tensor is absent."""
    tensor = tensors.get(name)
    if tensor is None:
        if required:
            raise fields.error("rope.scaling", f"needs the tensor {name}, which is missing")
        return ()
    if tensor.shape != (rotary_dim // 2,):
        raise FormatError(f"{name}: has shape {tensor.shape}; ({rotary_dim // 2},) is needed")
    values = tensor.dequantize()
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise FormatError(f"{name}: holds a value that is not finite and above 0")
    return tuple(values.tolist())


# -- sliding windows ---------------------------------------------------------------------------------


def _every_layer_slides(config: ModelConfig, fields: Fields) -> ModelConfig:
    """The window that applies to all layers, unless the family or a flag a layer says otherwise.

    0 means none. llama.cpp knows the flags for Gemma only; nybble writes them for all families.
    """
    window = fields.integer("attention.sliding_window", 0, minimum=0)
    layers = config.num_hidden_layers
    key = "attention.sliding_window_pattern"
    sliding = fields.booleans(key, layers) if fields.is_array(key) else (True,) * layers
    return _with_window(config, window, sliding)


def _with_window(config: ModelConfig, window: int, sliding: tuple[bool, ...]) -> ModelConfig:
    if window == 0:
        return replace(config, sliding_window=None, layer_types=())
    kinds: tuple[LayerType, ...] = tuple("sliding_attention" if s else "full_attention" for s in sliding)
    return replace(config, sliding_window=window, layer_types=kinds)


def _alternating(config: ModelConfig, fields: Fields, period: int, window: int) -> ModelConfig:
    """Every ``period``-th layer sees everything; the file may give the period or a flag a layer."""
    window = fields.integer("attention.sliding_window", window, minimum=0)
    layers = config.num_hidden_layers
    key = "attention.sliding_window_pattern"
    if fields.is_array(key):
        sliding = fields.booleans(key, layers)
    else:
        period = fields.integer(key, period)
        sliding = tuple(bool((layer + 1) % period) for layer in range(layers))
    return _with_window(config, window, sliding)


# -- what families add -------------------------------------------------------------------------------


def _phi3(config: ModelConfig, fields: Fields) -> ModelConfig:
    if fields.has("attention.sliding_window"):
        return config
    # Files made before the key existed: the 4k models (mini, 32 layers; medium, 40) have the window
    # that Microsoft's config.json gives them.
    if config.max_position_embeddings == 4096 and config.num_hidden_layers in (32, 40):
        return _with_window(config, 2047, (True,) * config.num_hidden_layers)
    return config


def _smollm3(config: ModelConfig, fields: Fields) -> ModelConfig:
    # Every fourth layer rotates nothing; the format has no key for it.
    return replace(config, rope_layers=tuple(bool((i + 1) % 4) for i in range(config.num_hidden_layers)))


def _gemma(config: ModelConfig, fields: Fields, largest: int) -> ModelConfig:
    """Both Gemmas: scaled embeddings; the largest model scales q by hidden_size / heads."""
    scale = config.attention_scale
    if scale is None and config.num_hidden_layers == largest:
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    return replace(
        config,
        embedding_scale=math.sqrt(config.hidden_size),
        attention_scale=scale,
        attention_softcap=fields.number("attn_logit_softcapping", 0.0) or None,
        logit_softcap=fields.number("final_logit_softcapping", 0.0) or None,
    )


def _gemma2(config: ModelConfig, fields: Fields) -> ModelConfig:
    config = _alternating(config, fields, period=2, window=4096)
    return replace(
        _gemma(config, fields, largest=46),
        attention_softcap=fields.number("attn_logit_softcapping", 50.0) or None,
        logit_softcap=fields.number("final_logit_softcapping", 30.0) or None,
    )


def _gemma3(config: ModelConfig, fields: Fields) -> ModelConfig:
    config = _alternating(config, fields, period=6, window=0)
    rope = config.rope
    if not fields.has("rope.freq_base"):
        rope = replace(rope, theta=1_000_000.0)
    local = RopeConfig(theta=fields.positive("rope.freq_base_swa", 10000.0), rotary_dim=rope.rotary_dim)
    return replace(_gemma(config, fields, largest=62), rope=rope, rope_local=local)


_GEMMA: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(permuted=True),
    "mistral": Architecture(permuted=True),
    "smollm3": Architecture(permuted=True, adjust=_smollm3),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "phi3": Architecture(adjust=_phi3),
    "gemma2": Architecture(**_GEMMA, adjust=_gemma2),
    "gemma3": Architecture(**_GEMMA, adjust=_gemma3),
}
"""``general.architecture``: the same names as in ``nybble.models``."""
