"""Writes a small transformers model as GGUF the way llama.cpp's converter does.

Needs torch, transformers and the ``gguf`` package.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from nybble.formats.gguf.names import gguf_name

ARCHITECTURES = {"gemma3_text": "gemma3"}
PERMUTED = ("llama", "mistral", "smollm3")


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k so that rotary pairs neighbours: (heads, 2, d/2) to (heads, d/2, 2)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: torch.nn.Module,
    path: Path,
    *,
    keys: dict[str, object] | None = None,
    omit: tuple[str, ...] = (),
    encoding: gguf.GGMLQuantizationType | None = None,
) -> None:
    """The model as one file.

    ``keys`` are more metadata (without the architecture's prefix; None takes a key away), ``omit``
    GGUF tensors to leave out, ``encoding`` that of the matrices (default f32).
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, object] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **(keys or {}),
    }
    if head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    for name, tensor in tensors(model, architecture).items():
        if name in omit:
            continue
        if encoding is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(tensor, encoding), raw_dtype=encoding)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """GGUF names and values, with what the converter changes on the way."""
    config, result = model.config, {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = parameter.numpy()
        if architecture in PERMUTED and ".q_proj." in name:
            value = permuted(value, config.num_attention_heads)
        if architecture in PERMUTED and ".k_proj." in name:
            value = permuted(value, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        result[gguf_name(architecture, name)] = np.ascontiguousarray(value)
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "llama3":
        scaled = model.model.rotary_emb.inv_freq.numpy()
        size = 2 * len(scaled)
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2) / size)
        result["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            result[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"], np.float32)
    return result
