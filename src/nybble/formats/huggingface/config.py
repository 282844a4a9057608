"""Hugging Face's config.json to ModelConfig: the shared keys, and a row for each family's own.

Files of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) are both
understood. Defaults are those of transformers' config classes, for files leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nybble.checkpoint.config import LayerType, ModelConfig, RopeConfig
from nybble.errors import UnsupportedError
from nybble.formats.fields import Fields

MAX_LAYERS = 4096
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class Family:
    """What one ``model_type`` has of its own."""

    architecture: str
    """Its name in ``nybble.models``."""
    defaults: Mapping[str, object]
    """Values of keys that the file leaves out."""
    adjust: Callable[[ModelConfig, Fields], ModelConfig]
    """Last changes to the config."""
    scaling_names: Mapping[str, str] = field(default_factory=dict)
    """What this family's files call a kind of rotary scaling, where not by its name."""


def read_config(values: Mapping[str, object], where: str = "config.json") -> ModelConfig:
    """The config in a parsed config.json.

    Raises:
        FormatError: a key is missing, of the wrong type or out of range; the message names it.
        UnsupportedError: a model type, activation or scaling that is not known.
    """
    model_type = Fields(values, where).string("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedError(f"{where}: unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    # An explicit null replaces the default: it means "none".
    fields = Fields({**_DEFAULTS, **family.defaults, **values}, where)
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads", maximum=hidden_size)
    if not fields.has("head_dim") and hidden_size % heads:
        raise fields.error("num_attention_heads", f"is {heads}, which does not divide {hidden_size}")
    head_dim = fields.integer("head_dim", hidden_size // heads, maximum=65536)
    config = ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads, maximum=heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rope=_rope(fields, head_dim, family.scaling_names),
        rms_norm_eps=fields.number("rms_norm_eps", maximum=1.0),
        hidden_act=_activation(fields),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        attention_output_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
    )
    return family.adjust(config, fields)


def _activation(fields: Fields) -> str:
    name = fields.string("hidden_activation", fields.string("hidden_act", "silu"))
    if name not in ACTIVATIONS:
        raise fields.unsupported("hidden_act", f"is {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# -- rotary embedding --------------------------------------------------------------------------------


def _rope(fields: Fields, head_dim: int, names: Mapping[str, str]) -> RopeConfig:
    """The rotary embedding of full attention."""
    parameters = fields.fields("rope_parameters")
    if parameters.has("full_attention"):
        parameters = parameters.fields("full_attention")
    scaling = fields.fields("rope_scaling") if fields.has("rope_scaling") else parameters
    theta = parameters.positive("rope_theta", fields.positive("rope_theta", 10000.0))
    partial = scaling.number(
        "partial_rotary_factor",
        parameters.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)),
        maximum=1.0,
    )
    return _scaled(fields, scaling, theta, int(head_dim * partial), names)


def _scaled(
    fields: Fields, scaling: Fields, theta: float, rotary_dim: int, names: Mapping[str, str]
) -> RopeConfig:
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error("head_dim", f"makes {rotary_dim} rotated features; an even number is needed")
    kind = scaling.string("rope_type", scaling.string("type", "default"))
    read = _SCALINGS.get(names.get(kind, kind))
    if read is None:
        raise scaling.unsupported("rope_type", f"is {kind!r}; known: {', '.join(_SCALINGS)}")
    return read(RopeConfig(theta=theta, rotary_dim=rotary_dim), fields, scaling)


def _linear(rope: RopeConfig, fields: Fields, scaling: Fields) -> RopeConfig:
    return replace(rope, kind="linear", factor=scaling.positive("factor"))


def _dynamic(rope: RopeConfig, fields: Fields, scaling: Fields) -> RopeConfig:
    return replace(
        rope,
        kind="dynamic",
        factor=scaling.positive("factor"),
        original_max_position_embeddings=fields.integer("max_position_embeddings"),
    )


def _llama3(rope: RopeConfig, fields: Fields, scaling: Fields) -> RopeConfig:
    return replace(
        rope,
        kind="llama3",
        factor=scaling.positive("factor"),
        low_freq_factor=scaling.positive("low_freq_factor"),
        high_freq_factor=scaling.positive("high_freq_factor"),
        original_max_position_embeddings=_original(fields, scaling),
    )


def _yarn(rope: RopeConfig, fields: Fields, scaling: Fields) -> RopeConfig:
    if not scaling.boolean("truncate", True):
        raise scaling.unsupported("truncate", "is false, which is not supported")
    original = _original(fields, scaling)
    return replace(
        rope,
        kind="yarn",
        factor=scaling.positive("factor", fields.integer("max_position_embeddings") / original),
        original_max_position_embeddings=original,
        attention_factor=scaling.number("attention_factor", None),
        beta_fast=scaling.positive("beta_fast", 32.0),
        beta_slow=scaling.positive("beta_slow", 1.0),
        mscale=scaling.number("mscale", 0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0),
    )


def _longrope(rope: RopeConfig, fields: Fields, scaling: Fields) -> RopeConfig:
    original = _original(fields, scaling)
    return replace(
        rope,
        kind="longrope",
        factor=scaling.positive("factor", fields.integer("max_position_embeddings") / original),
        original_max_position_embeddings=original,
        short_factor=scaling.numbers("short_factor", rope.rotary_dim // 2),
        long_factor=scaling.numbers("long_factor", rope.rotary_dim // 2),
        attention_factor=scaling.number("attention_factor", None),
    )


_SCALINGS: Mapping[str, Callable[[RopeConfig, Fields, Fields], RopeConfig]] = {
    "default": lambda rope, fields, scaling: rope,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original(fields: Fields, scaling: Fields) -> int:
    """Trained context length: in the scaling, beside it, or the maximum."""
    key = "original_max_position_embeddings"
    maximum = fields.integer("max_position_embeddings")
    return scaling.integer(key, fields.integer(key, maximum))


# -- sliding windows ---------------------------------------------------------------------------------


def _window(config: ModelConfig, fields: Fields, slides: Callable[[int], bool]) -> ModelConfig:
    """Sets window and layer types: the file's own, or those that ``slides(layer)`` says."""
    window = fields.integer("sliding_window", None)
    if window is None:
        return config
    kinds: tuple[LayerType, ...]
    if fields.has("layer_types"):
        given = fields.strings("layer_types", config.num_hidden_layers)
        if unknown := set(given) - {"full_attention", "sliding_attention"}:
            raise fields.unsupported("layer_types", f"has unknown kinds: {', '.join(sorted(unknown))}")
        kinds = tuple(
            "sliding_attention" if kind == "sliding_attention" else "full_attention" for kind in given
        )
    else:
        kinds = tuple(
            "sliding_attention" if slides(layer) else "full_attention"
            for layer in range(config.num_hidden_layers)
        )
    return replace(config, sliding_window=window, layer_types=kinds)


# -- families ----------------------------------------------------------------------------------------


def _llama(config: ModelConfig, fields: Fields) -> ModelConfig:
    return config


def _every_layer_slides(config: ModelConfig, fields: Fields) -> ModelConfig:
    return _window(config, fields, lambda layer: True)


def _qwen(config: ModelConfig, fields: Fields) -> ModelConfig:
    if not fields.boolean("use_sliding_window", False):
        return config
    first = fields.integer("max_window_layers", 28, minimum=0)
    return _window(config, fields, lambda layer: layer >= first)


def _qwen2(config: ModelConfig, fields: Fields) -> ModelConfig:
    return replace(_qwen(config, fields), attention_bias=True, attention_output_bias=False)


def _qwen3(config: ModelConfig, fields: Fields) -> ModelConfig:
    return replace(_qwen(config, fields), query_key_norm=True)


def _smollm3(config: ModelConfig, fields: Fields) -> ModelConfig:
    layers = config.num_hidden_layers
    if fields.has("no_rope_layers"):
        rotates = fields.booleans("no_rope_layers", layers)  # 1: the layer *has* rotary
    else:
        interval = fields.integer("no_rope_layer_interval", 4)
        rotates = tuple(bool((layer + 1) % interval) for layer in range(layers))
    config = replace(config, rope_layers=rotates)
    if not fields.boolean("use_sliding_window", False):
        return config
    return _window(config, fields, lambda layer: not rotates[layer])


def _gemma2(config: ModelConfig, fields: Fields) -> ModelConfig:
    period = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 2))
    config = _window(config, fields, lambda layer: bool((layer + 1) % period))
    return replace(
        config,
        rms_norm_offset=1.0,
        embedding_scale=math.sqrt(config.hidden_size),
        attention_scale=fields.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=fields.number("attn_logit_softcapping", None) or None,
        logit_softcap=fields.number("final_logit_softcapping", None) or None,
    )


def _gemma3(config: ModelConfig, fields: Fields) -> ModelConfig:
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.unsupported("use_bidirectional_attention", "is true; not supported")
    local = fields.fields("rope_parameters").fields("sliding_attention")
    theta = local.positive("rope_theta", fields.positive("rope_local_base_freq", 10000.0))
    # transformers ignores Gemma 3's attention softcap.
    config = replace(_gemma2(config, fields), query_key_norm=True, attention_softcap=None)
    return replace(config, rope_local=_scaled(fields, local, theta, config.head_dim, {}))


_DEFAULTS: Mapping[str, object] = {"rms_norm_eps": 1e-6}
_QWEN: dict[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096}
_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", {}, _llama),
    "mistral": Family("mistral", {"sliding_window": 4096, "num_key_value_heads": 8}, _every_layer_slides),
    "smollm3": Family(
        "smollm3",
        {"tie_word_embeddings": True, "rope_theta": 2000000.0, "num_key_value_heads": 4},
        _smollm3,
    ),
    "qwen2": Family("qwen2", _QWEN, _qwen2),
    "qwen3": Family("qwen3", {**_QWEN, "head_dim": 128}, _qwen3),
    "phi3": Family(
        "phi3",
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        _every_layer_slides,
        scaling_names={"su": "longrope", "yarn": "longrope"},  # Microsoft's files of 2024
    ),
    "gemma2": Family(
        "gemma2", {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, _gemma2
    ),
    "gemma3_text": Family(
        "gemma3", {**_GEMMA, "rope_theta": 1000000.0, "_sliding_window_pattern": 6}, _gemma3
    ),
}
"""By ``model_type``."""
