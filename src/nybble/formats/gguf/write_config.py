"""ModelConfig to GGUF metadata and tensors: the reverse of ``config.py``.

Keys and their order follow llama.cpp's ``convert_hf_to_gguf.py``. A config that GGUF's keys cannot say
is refused: what ``config.py`` reads back from the written keys must be the same model.

Mistral is written as the architecture ``llama``, as llama.cpp's converter does; its sliding window is
written too, which nybble reads and llama.cpp ignores (there every token sees everything before it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.formats.gguf.config import ARCHITECTURES, read_config
from nybble.graph.rotary import rotary_frequencies

WRITTEN_AS: Mapping[str, str] = {"mistral": "llama"}
"""Architectures that GGUF files have under another name."""

_GEMMA = ("gemma2", "gemma3")


def require_gguf_form(config: ModelConfig) -> None:
    """Checks that a config has GGUF's conventions.

    Raises:
        ValueError: it has another format's; the message says which.
        UnsupportedError: GGUF files of this architecture are not known.
    """
    row = ARCHITECTURES.get(config.architecture)
    if row is None:
        raise UnsupportedError(
            f"GGUF has no architecture {config.architecture!r} that nybble knows;"
            f" known: {', '.join(ARCHITECTURES)}"
        )
    if config.rope.interleaved != row.permuted:
        held = "neighbouring" if row.permuted else "distant"
        raise ValueError(
            f"the checkpoint is not in GGUF form: q and k of {config.architecture} must have"
            f" {held} features paired (rope.interleaved {row.permuted})"
        )
    if config.rms_norm_offset:
        raise ValueError(
            f"the checkpoint is not in GGUF form: rms_norm_offset is {config.rms_norm_offset},"
            " but the norms' weights must contain it"
        )
    if config.rope.kind == "llama3":
        raise ValueError(
            "the checkpoint is not in GGUF form: rope scaling llama3 must be given as frequency_factors"
        )


def config_metadata(config: ModelConfig) -> dict[str, object]:
    """The keys that say this config, ``general.architecture`` first.

    Raises:
        ValueError: the config is not in GGUF form.
        UnsupportedError: GGUF has no keys for it.
    """
    require_gguf_form(config)
    architecture = WRITTEN_AS.get(config.architecture, config.architecture)
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **_rope_keys(config),
        **_window_keys(config),
        **_scale_keys(config),
    }
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in keys.items()},
    }


def config_tensors(config: ModelConfig) -> list[Tensor]:
    """The rotary divisors that a GGUF file holds as tensors: f32 (rotary_dim / 2,)."""
    rope = config.rope
    rows = {"rope_freqs.weight": rope.frequency_factors}
    if rope.kind == "longrope":
        rows |= {"rope_factors_long.weight": rope.long_factor, "rope_factors_short.weight": rope.short_factor}
    return [
        Tensor(name, (len(values),), encoding("f32"), np.array(values, "<f4").view(np.uint8))
        for name, values in rows.items()
        if values
    ]


def _rope_keys(config: ModelConfig) -> dict[str, object]:
    rope = config.rope
    keys: dict[str, object] = {"rope.dimension_count": rope.rotary_dim, "rope.freq_base": rope.theta}
    if config.rope_local is not None:
        keys["rope.freq_base_swa"] = config.rope_local.theta
    if rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind in ("yarn", "longrope") or config.architecture == "phi3":
        keys["rope.scaling.original_context_length"] = (
            rope.original_max_position_embeddings or config.max_position_embeddings
        )
    if rope.kind == "yarn":
        # llama.cpp multiplies its own 1 + 0.1 ln(factor) by this key.
        prescribed = 1.0 + 0.1 * math.log(rope.factor) if rope.factor > 1 else 1.0
        keys |= {
            "rope.scaling.attn_factor": rotary_frequencies(rope, 1)[1] / prescribed,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
    if rope.kind == "longrope":
        keys["rope.scaling.attn_factor"] = rotary_frequencies(rope, 1)[1]
    return keys


def _window_keys(config: ModelConfig) -> dict[str, object]:
    """The window, and a flag a layer where the layers are not those that a reader expects."""
    sliding = [config.layer_window(layer) is not None for layer in range(config.num_hidden_layers)]
    # These families have a default: 0 says that there is no window.
    if not any(sliding):
        return {"attention.sliding_window": 0} if config.architecture in ("phi3", "gemma2") else {}
    keys: dict[str, object] = {"attention.sliding_window": config.sliding_window}
    period = {"gemma2": 2, "gemma3": 6}.get(config.architecture)
    expected = [period is None or bool((layer + 1) % period) for layer in range(len(sliding))]
    if sliding != expected:
        keys["attention.sliding_window_pattern"] = np.array(sliding)
    return keys


def _scale_keys(config: ModelConfig) -> dict[str, object]:
    """Scales and caps that are not what the architecture has without a key."""
    keys: dict[str, object] = {}
    if not attention_scale_is_default(config):
        keys["attention.scale"] = _attention_scale(config)
    if config.architecture in _GEMMA:
        caps = {
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
        # Gemma 2 has caps unless a file says 0.
        keys |= {key: cap or 0.0 for key, cap in caps.items() if cap or config.architecture == "gemma2"}
    elif config.embedding_scale != 1:
        keys["embedding_scale"] = config.embedding_scale
    for key in ("logit_scale", "residual_scale"):
        if getattr(config, key) != 1:
            keys[key] = getattr(config, key)
    return keys


def attention_scale_is_default(config: ModelConfig) -> bool:
    """Whether a file needs no key for the scale of q.k."""
    return _same(_attention_scale(config), _default_attention_scale(config))


def _attention_scale(config: ModelConfig) -> float:
    return config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale


def _default_attention_scale(config: ModelConfig) -> float:
    """What readers take without ``attention.scale``: only the largest Gemmas differ from head_dim."""
    if config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}.get(config.architecture):
        return float((config.hidden_size // config.num_attention_heads) ** -0.5)
    return float(config.head_dim**-0.5)


# -- what a reader makes of it -------------------------------------------------------------------------


def check_config(config: ModelConfig, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Checks that a file with these keys and tensors (by GGUF name) is read as the same model.

    Raises:
        UnsupportedError: it is not; the message names what GGUF cannot say.
    """
    # A file has float32.
    stored = {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in metadata.items()
    }
    found = read_config(stored, tensors, "the metadata for GGUF")
    different = differences(config, found)
    if different:
        raise UnsupportedError(
            f"GGUF cannot express this {config.architecture} model: a reader would find "
            + "; ".join(f"{name} {theirs} instead of {ours}" for name, ours, theirs in different)
        )


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, object, object]]:
    """The fields in which two configs in GGUF form are different models: (name, ours, theirs).

    Floats count as equal within the precision of float32, and so do two ways to say the same.
    """
    return _differences(_plain(ours), _plain(theirs), "")


def _plain(config: ModelConfig) -> ModelConfig:
    """The config with one way to say everything."""
    sliding = [config.layer_window(layer) is not None for layer in range(config.num_hidden_layers)]
    return replace(
        config,
        architecture=WRITTEN_AS.get(config.architecture, config.architecture),
        rope=_plain_rope(config.rope),
        rope_local=_plain_rope(config.rope_local) if config.rope_local and any(sliding) else None,
        sliding_window=config.sliding_window if any(sliding) else None,
        layer_types=tuple("sliding_attention" if s else "full_attention" for s in sliding),
        rope_layers=() if all(config.rope_layers) else config.rope_layers,
        attention_scale=_attention_scale(config),
    )


def _plain_rope(rope: RopeConfig) -> RopeConfig:
    """Without the fields that the kind does not use, and with its factor on cos and sin."""
    factor = rotary_frequencies(rope, 1)[1]
    scaled = rope.kind in ("yarn", "longrope")
    return replace(
        RopeConfig(rope.theta, rope.rotary_dim, rope.kind, rope.interleaved),
        factor=rope.factor if rope.kind in ("linear", "dynamic", "yarn") else 1.0,
        original_max_position_embeddings=rope.original_max_position_embeddings if scaled else None,
        short_factor=rope.short_factor,
        long_factor=rope.long_factor,
        frequency_factors=rope.frequency_factors,
        attention_factor=factor,
        beta_fast=rope.beta_fast if rope.kind == "yarn" else 32.0,
        beta_slow=rope.beta_slow if rope.kind == "yarn" else 1.0,
    )


def _differences(ours: Any, theirs: Any, prefix: str) -> list[tuple[str, object, object]]:
    found: list[tuple[str, object, object]] = []
    for item in fields(ours):
        if not item.compare:
            continue
        a, b = getattr(ours, item.name), getattr(theirs, item.name)
        if is_dataclass(a) and is_dataclass(b):
            found += _differences(a, b, f"{prefix}{item.name}.")
        elif not _same(a, b):
            found.append((f"{prefix}{item.name}", a, b))
    return found


def _same(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
