"""ModelConfig to Hugging Face's config.json: the reverse of ``config.py``, a row for each family.

The keys are those of transformers 4 (``rope_theta``, ``rope_scaling``), which transformers 5 and the other
readers of such folders understand as well. What is written is read again and compared: a config that
a family's class in transformers cannot express is an error, never an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.errors import NybbleError
from nybble.formats.huggingface.config import read_config

_CONFIG = "huggingface.config"
_NOT_KEPT = frozenset(
    # Of other files, or true of other bytes only.
    {"quantization_config", "compression_config", "auto_map", "_name_or_path", "_attn_implementation"}
)
_MATHEMATICS = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "hidden_activation",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "no_rope_layers",
        "no_rope_layer_interval",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    }
)
"""Keys that this module decides about."""


@dataclass(frozen=True)
class Family:
    """How one architecture is written."""

    model_type: str
    class_name: str
    own: Callable[[ModelConfig], dict[str, Any]]
    """The keys that only this family has, and those about sliding windows."""
    activation: str = "hidden_act"
    attention_bias: bool = True
    """Whether its class has the key; without it there is no choice about the bias."""
    mlp_bias: bool = False
    scalings: frozenset[str] | None = None
    """Kinds of rotary scaling that its class takes; None: all."""
    partial_rotary: bool = False


def config_json(config: ModelConfig, metadata: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The content of config.json, without ``torch_dtype``, which depends on the tensors.

    ``metadata`` is a checkpoint's: where it has a config.json, keys that the mathematics does not need
    are kept, and all of it where it still says the same. Token ids may also come from GGUF metadata.

    Raises:
        ValueError: the config is not in Hugging Face's form (``checkpoint/forms.py`` changes that),
            or says what its family's class in transformers has no key for.
    """
    metadata = metadata or {}
    original = _original(metadata)
    if original and _reads_as(original, config):
        return {key: deepcopy(value) for key, value in original.items() if key not in _NOT_KEPT}
    name = _family_name(config)
    family = FAMILIES.get(name)
    if family is None:
        raise ValueError(
            f"Hugging Face has no model for the architecture {name!r}; known: {', '.join(FAMILIES)}"
        )
    _check(config, family)
    values = _shared(config, family) | _rope(config, family) | family.own(config)
    kept: dict[str, Any] = {}
    if original.get("model_type") == family.model_type:
        kept = {k: deepcopy(v) for k, v in original.items() if k not in _MATHEMATICS | _NOT_KEPT}
    result = {**values, **_token_ids(metadata, config), **kept}
    _check_same(config, read_config(result, "the config"))
    return result


def _original(metadata: Mapping[str, object]) -> dict[str, Any]:
    """The config.json that the model came with; of a model with images, its text part."""
    found = metadata.get(_CONFIG)
    if not isinstance(found, dict):
        return {}
    text = found.get("text_config")
    if found.get("model_type") == "gemma3" and isinstance(text, dict):
        return {"architectures": ["Gemma3ForCausalLM"], **text, "model_type": "gemma3_text"}
    return found


def _reads_as(original: dict[str, Any], config: ModelConfig) -> bool:
    try:
        return read_config(original) == config
    except NybbleError:
        return False


def _family_name(config: ModelConfig) -> str:
    """The architecture; a GGUF file calls Mistral llama, whose class has no sliding window."""
    if config.architecture == "llama" and any(map(config.layer_window, range(config.num_hidden_layers))):
        return "mistral"
    return config.architecture


def _shared(config: ModelConfig, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        family.activation: config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    # Phi-3's class takes the quotient alone.
    if family.model_type != "phi3" or config.head_dim * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    if family.attention_bias:
        values["attention_bias"] = config.attention_bias
    if family.mlp_bias:
        values["mlp_bias"] = config.mlp_bias
    return values


# -- rotary embedding --------------------------------------------------------------------------------


def _rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    rope = config.rope
    values: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.rotary_dim != config.head_dim:
        values["partial_rotary_factor"] = _factor(rope.rotary_dim, config.head_dim)
    if family.model_type == "phi3":
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        values["original_max_position_embeddings"] = original
    values["rope_scaling"] = _SCALINGS[rope.kind](rope, config, family)
    return values


def _factor(part: int, whole: int) -> float:
    """The factor with ``int(whole * factor) == part``."""
    factor = part / whole
    return factor if int(whole * factor) == part else math.nextafter(factor, 1.0)


def _llama3(rope: RopeConfig, config: ModelConfig, family: Family) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def _yarn(rope: RopeConfig, config: ModelConfig, family: Family) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        **({"mscale": rope.mscale} if rope.mscale else {}),
        **({"mscale_all_dim": rope.mscale_all_dim} if rope.mscale_all_dim else {}),
        **_attention_factor(rope),
    }


def _longrope(rope: RopeConfig, config: ModelConfig, family: Family) -> dict[str, Any]:
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    # Phi-3's class of transformers 4 takes the name `type` and the two lists, and nothing else.
    phi3 = family.model_type == "phi3"
    values: dict[str, Any] = {
        "type" if phi3 else "rope_type": "longrope",
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
    }
    if not phi3:
        values["original_max_position_embeddings"] = original
    if rope.factor != config.max_position_embeddings / original:
        values["factor"] = rope.factor
    return values | _attention_factor(rope)


def _attention_factor(rope: RopeConfig) -> dict[str, Any]:
    return {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}


_SCALINGS: Mapping[str, Callable[[RopeConfig, ModelConfig, Family], dict[str, Any] | None]] = {
    "default": lambda rope, config, family: None,
    "linear": lambda rope, config, family: {"rope_type": "linear", "factor": rope.factor},
    "dynamic": lambda rope, config, family: {"rope_type": "dynamic", "factor": rope.factor},
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


# -- families ----------------------------------------------------------------------------------------


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {}


def _one_window(config: ModelConfig) -> dict[str, Any]:
    """Families in which all layers slide or none does."""
    windows = {config.layer_window(layer) for layer in range(config.num_hidden_layers)}
    if len(windows) > 1:
        raise ValueError(f"{config.architecture}: only some layers have a sliding window; all or none may")
    return {"sliding_window": windows.pop()}


def _qwen(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    types = _layer_types(config)
    sliding = [kind == "sliding_attention" for kind in types]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": sliding.index(True) if True in sliding else len(sliding),
        "layer_types": types,
    }


def _smollm3(config: ModelConfig) -> dict[str, Any]:
    rotates = config.rope_layers or (True,) * config.num_hidden_layers
    values: dict[str, Any] = {"no_rope_layers": [int(flag) for flag in rotates], "use_sliding_window": False}
    if config.sliding_window is None:
        return values
    return values | {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


def _gemma(config: ModelConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        "query_pre_attn_scalar": _whole(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        # Its class wants a window even where no layer uses it.
        "sliding_window": config.sliding_window or 4096,
        "layer_types": _layer_types(config),
    }


def _gemma3(config: ModelConfig) -> dict[str, Any]:
    local = config.rope_local or config.rope
    if local != RopeConfig(theta=local.theta, rotary_dim=config.head_dim):
        raise ValueError("gemma3: scaled rotary positions of sliding layers cannot be written")
    values = _gemma(config) | {"rope_local_base_freq": local.theta}
    full = [i for i, kind in enumerate(values["layer_types"], 1) if kind == "full_attention"]
    if full and full == list(range(full[0], config.num_hidden_layers + 1, full[0])):
        values["sliding_window_pattern"] = full[0]  # for readers that do not know layer_types
    return values


def _layer_types(config: ModelConfig) -> list[str]:
    return [config.layer_type(layer) for layer in range(config.num_hidden_layers)]


def _whole(value: float) -> float:
    """``value`` as an int where it is one but for rounding; classes want it so."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-6) else value


_GEMMA: dict[str, Any] = {"activation": "hidden_activation"}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _llama, mlp_bias=True),
    "mistral": Family("mistral", "MistralForCausalLM", _one_window, attention_bias=False),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _smollm3, mlp_bias=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _qwen, attention_bias=False),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _qwen),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        _one_window,
        attention_bias=False,
        scalings=frozenset({"default", "longrope"}),
        partial_rotary=True,
    ),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _gemma, **_GEMMA),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, **_GEMMA),
}
"""By ``ModelConfig.architecture``."""


# -- token ids ---------------------------------------------------------------------------------------


def _token_ids(metadata: Mapping[str, object], config: ModelConfig) -> dict[str, Any]:
    """Ids of begin, end and padding, null where unknown: the classes' defaults fit other models."""
    generation = metadata.get("huggingface.generation_config")
    genai = metadata.get("onnx.genai_config")
    model = genai.get("model") if isinstance(genai, Mapping) else None
    sources = [source for source in (generation, model) if isinstance(source, Mapping)]
    result: dict[str, Any] = {}
    for key, gguf in (
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ("pad_token_id", "tokenizer.ggml.padding_token_id"),
    ):
        found = [source.get(key) for source in sources] + [metadata.get(gguf)]
        result[key] = next((value for value in map(_ids, found) if value is not None), None)
    padding = result["pad_token_id"]
    if not isinstance(padding, int) or padding >= config.vocab_size:
        result["pad_token_id"] = None
    return result


def _ids(value: object) -> int | list[int] | None:
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        return list(value)
    return value if type(value) is int and value >= 0 else None


# -- checks ------------------------------------------------------------------------------------------


def _check(config: ModelConfig, family: Family) -> None:
    """What reading the result again would not find: where nybble reads more than transformers does."""
    name, rope = config.architecture, config.rope
    if rope.interleaved or rope.frequency_factors:
        raise ValueError(f"{name}: the checkpoint is in GGUF's form; Hugging Face's is needed")
    if family.scalings is not None and rope.kind not in family.scalings:
        raise ValueError(f"{name}: its class in transformers has no rotary scaling of the kind {rope.kind!r}")
    if rope.rotary_dim != config.head_dim and not family.partial_rotary:
        raise ValueError(f"{name}: its class in transformers rotates whole heads only")
    always = family.model_type == "qwen2"
    if config.attention_bias and not (family.attention_bias or always):
        raise ValueError(f"{name}: its class in transformers has no bias on q, k and v")
    if config.mlp_bias and not family.mlp_bias:
        raise ValueError(f"{name}: its class in transformers has no bias in the MLP")


def _check_same(wanted: ModelConfig, written: ModelConfig) -> None:
    """Raises ValueError, with the fields, unless both configs are the same mathematics."""
    different = [
        field.name
        for field in fields(ModelConfig)
        if field.name not in ("extra", "rope", "rope_local", "rope_layers", "sliding_window", "layer_types")
        and not _same(getattr(_plain(wanted), field.name), getattr(_plain(written), field.name))
    ]
    layers = range(min(wanted.num_hidden_layers, written.num_hidden_layers))
    if any(wanted.layer_rope(layer) != written.layer_rope(layer) for layer in layers):
        different.append("rope")
    if any(wanted.layer_window(layer) != written.layer_window(layer) for layer in layers):
        different.append("sliding_window")
    if different:
        raise ValueError(
            f"{wanted.architecture}: config.json of {written.architecture} cannot say this model's"
            f" {', '.join(different)}"
        )


def _plain(config: ModelConfig) -> ModelConfig:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return replace(
        config,
        architecture="llama" if config.architecture == "mistral" else config.architecture,
        attention_scale=scale,
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
