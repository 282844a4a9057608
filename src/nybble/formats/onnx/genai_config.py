"""genai_config.json: what onnxruntime-genai must know about a model beside its graph.

Structure and defaults are those of ``onnxruntime_genai.models.builder`` (0.18).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.checkpoint.config import ModelConfig
from nybble.graph.onnx.nodes import OnnxGraph
from nybble.graph.onnx.target import Target

MODEL_TYPES: Mapping[str, str] = {"gemma3": "gemma3_text"}
"""onnxruntime-genai's name of an architecture, where it is not ours."""
_SEARCH: Mapping[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "repetition_penalty": (int, float),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
}
"""Search options that generation_config.json may set."""


def genai_config(
    config: ModelConfig, graph: OnnxGraph, target: Target, generation: Mapping[str, object]
) -> dict[str, Any]:
    """The file's content.

    Args:
        config: the model's.
        graph: for the names of inputs.
        target: for the provider.
        generation: generation_config.json's content: token ids, and sampling where recommended.
    """
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    present = {value.name for value in graph.inputs}
    inputs = {name: value for name, value in inputs.items() if value in present}
    inputs |= {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    bos, eos = _ids(generation.get("bos_token_id")), _ids(generation.get("eos_token_id"))
    pad = _ids(generation.get("pad_token_id"))
    providers = [] if target.provider == "cpu" else [{target.provider: dict(target.provider_options)}]
    model: dict[str, Any] = {
        "bos_token_id": bos[0] if bos else 1,
        "context_length": config.max_position_embeddings,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
            "filename": "model.onnx",
            "head_size": config.head_dim,
            "hidden_size": config.hidden_size,
            "inputs": inputs,
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
        },
        "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else 2),
        "pad_token_id": pad[0] if pad else (eos[0] if eos else 0),
        "type": MODEL_TYPES.get(config.architecture, config.architecture),
        "vocab_size": config.vocab_size,
    }
    windows = {layer: target.cache_window(config, layer) for layer in range(config.num_hidden_layers)}
    sliding = [layer for layer, window in windows.items() if window is not None]
    if sliding:
        model["decoder"]["sliding_window"] = {
            "window_size": windows[sliding[0]],
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": sliding,
            "cache_slack": 0,
        }
    search: dict[str, Any] = {
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": config.max_position_embeddings,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": not target.portable,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    for name, kinds in _SEARCH.items():
        value = generation.get(name)
        if isinstance(value, kinds):
            search[name] = value
    return {"model": model, "search": search}


def generation_config(files: Mapping[str, bytes], metadata: Mapping[str, object]) -> dict[str, object]:
    """Token ids and recommended sampling: from the tokenizer's files, else from the metadata."""
    text = files.get("generation_config.json")
    found = json.loads(text) if text else metadata.get("huggingface.generation_config")
    result = dict(found) if isinstance(found, Mapping) else {}
    config = metadata.get("huggingface.config")
    if isinstance(config, Mapping):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if result.get(name) is None and config.get(name) is not None:
                result[name] = config[name]
    return result


def _ids(value: object) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [int(item) for item in value]
    return []
