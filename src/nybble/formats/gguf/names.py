"""Tensor names: GGUF's and the canonical ones (Hugging Face's), as a table per architecture.

GGUF's names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from nybble.errors import UnsupportedError

_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Outside the layers; the same for every architecture."""

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QUERY_KEY_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}

_LLAMA = {**_ATTENTION, **_FFN_NORM, **_MLP}
_GEMMA2 = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

LAYER_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, **_QUERY_KEY_NORM},
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "gemma2": _GEMMA2,
    "gemma3": {**_GEMMA2, **_QUERY_KEY_NORM},
}
"""Names inside layer N (``blk.N.`` and ``model.layers.N.``), by architecture."""

CONFIG_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that are part of the config (rotary divisors)."""

_IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
"""Precomputed frequencies that very old files carry and nothing reads."""

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
_OUTER = re.compile(r"(\w+)\.(weight|bias)")


def canonical_name(architecture: str, name: str) -> str | None:
    """The canonical name of a GGUF tensor; None for one that is no weight.

    Raises:
        UnsupportedError: the architecture has no tensor of that name, so running the model without
            it would give wrong answers (experts in a ``llama`` file, for example).
    """
    if name in CONFIG_TENSORS or _IGNORED.fullmatch(name):
        return None
    if (match := _LAYER.fullmatch(name)) and (inner := LAYER_NAMES[architecture].get(match[2])):
        return f"model.layers.{match[1]}.{inner}.{match[3]}"
    if (match := _OUTER.fullmatch(name)) and (outer := _MODEL.get(match[1])):
        return f"{outer}.{match[2]}"
    raise UnsupportedError(
        f"tensor {name!r} does not belong to a model of the architecture {architecture!r} as nybble knows it"
    )


def gguf_name(architecture: str, name: str) -> str:
    """The GGUF name of a canonical tensor: the reverse of ``canonical_name``.

    Raises:
        UnsupportedError: GGUF has no name for it in this architecture.
    """
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    table, inner = (LAYER_NAMES[architecture], match[2]) if match else (_MODEL, stem)
    for short, canonical in table.items():
        if canonical == inner and kind in ("weight", "bias"):
            return f"blk.{match[1]}.{short}.{kind}" if match else f"{short}.{kind}"
    raise UnsupportedError(f"GGUF has no name for the tensor {name!r} in the architecture {architecture!r}")
