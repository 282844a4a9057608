"""A Hugging Face folder as a Checkpoint: config.json, safetensors, tokenizer, chat templates.

Tensor names and conventions of these folders are nybble's canonical ones, so that nothing is
renamed or moved; quantized checkpoints come through ``quantized/``. Nothing is loaded: tensors are
views of the mapped files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, NotFoundError, NybbleError, UnsupportedError
from nybble.formats.huggingface.config import read_config
from nybble.formats.huggingface.templates import read_chat_templates
from nybble.formats.json_text import read_object, read_object_if_there
from nybble.formats.safetensors.reader import INDEX_SUFFIX, SUFFIX, SafetensorsFile, read_safetensors
from nybble.text.tokenizer import FolderTokenizerSource

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_COMPARED = 64 << 20  # bytes of two tensors that are compared at a time

# Tools of 2023 wrote what quantization_config says to files of their own.
_OLD_QUANTIZATION = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_huggingface_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder, or one ``*.safetensors`` file (any shard) or index in such a folder.

    Raises:
        NotFoundError: there is no such folder, or config.json or the weights are missing.
        FormatError: a file is damaged, or files do not fit together.
        UnsupportedError: an architecture, dtype or quantization that is not known, or weights that
            are only there as pickle files.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    values = _config_values(folder)
    weights = read_safetensors(weights_path(path))
    try:
        return _checkpoint(folder, values, weights)
    except NybbleError:
        weights.close()
        raise


def _checkpoint(folder: Path, values: dict[str, Any], weights: SafetensorsFile) -> Checkpoint:
    where = str(folder / CONFIG)
    text_values, prefixes = _text_part(values)
    config = read_config(text_values, where)
    tensors = _canonical(weights, prefixes)
    quantization = _quantization(folder, values)
    if quantization is not None:
        from nybble.formats.huggingface.quantized import quantized_tensors

        tensors = dict(quantized_tensors(tensors, quantization, config))
    config, tensors = _tied(config, tensors)
    template, named = read_chat_templates(folder)
    generation = read_object_if_there(folder / GENERATION_CONFIG)
    metadata: dict[str, object] = {"huggingface.config": values}
    if generation:
        metadata["huggingface.generation_config"] = generation
    if weights.metadata:
        metadata["huggingface.safetensors"] = dict(weights.metadata)
    return Checkpoint(
        config=config,
        tensors=tensors,
        tokenizer=FolderTokenizerSource(folder) if (folder / "tokenizer.json").is_file() else None,
        chat_template=template,
        chat_templates=named,
        metadata=metadata,
        source=folder,
        format="safetensors",
        name=folder.resolve().name,
    )


# -- which files -------------------------------------------------------------------------------------


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if path.is_file():
        return read_object(path)
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedError(f"{folder}: is a LoRA adapter and no model: name the model that it belongs to")
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder")
    raise NotFoundError(f"{path}: no such file; a Hugging Face folder has its config beside the weights")


def weights_path(path: Path) -> Path:
    """The file or the index with the weights."""
    if not path.is_dir():
        match = _SHARD.fullmatch(path.name)
        index = path.with_name(f"{match['stem']}{INDEX_SUFFIX}") if match else None
        return index if index is not None and index.is_file() else path
    for name in (f"model{SUFFIX}", f"model{INDEX_SUFFIX}"):
        if (path / name).is_file():
            return path / name
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return indexes[0]
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) == 1 and not indexes and not _SHARD.fullmatch(files[0].name):
        return files[0]
    if files:
        shards = [file.name for file in files if _SHARD.fullmatch(file.name)]
        if shards and not indexes:
            raise NotFoundError(
                f"{path}: has {shards[0]}, but no model{INDEX_SUFFIX}, which names all parts of the model"
            )
        names = ", ".join(file.name for file in files[:10])
        raise NotFoundError(f"{path}: holds several models, name one of its files: {names}")
    if any(file for pattern in _PICKLES for file in path.glob(pattern)):
        raise UnsupportedError(
            f"{path}: has its weights as pickle files (pytorch_model.bin), which can run code when they are"
            " read; nybble reads safetensors: save the model again with transformers"
            " (model.save_pretrained) or take a repository that has *.safetensors"
        )
    raise NotFoundError(f"{path}: has {CONFIG}, but no *{SUFFIX}")


# -- what they hold ----------------------------------------------------------------------------------


def _text_part(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """The config of the language model, and how its tensors' names begin and should.

    Gemma 3 from 4 B on is a model of text and images; its text part is a model of its own.
    """
    if values.get("model_type") != "gemma3" or not isinstance(values.get("text_config"), dict):
        return values, ()
    defaults = {"vocab_size": 262208, "max_position_embeddings": 131072, "model_type": "gemma3_text"}
    inherited = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
    prefixes = (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    )
    return {**defaults, **inherited, **values["text_config"]}, prefixes


def _canonical(weights: SafetensorsFile, prefixes: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The tensors of the language model by canonical name, in the file's order."""
    tensors: dict[str, Tensor] = {}
    for name in weights.infos:
        if name.endswith("rotary_emb.inv_freq"):
            continue  # of 2023; follows from the config
        canonical = name
        for begins, should in prefixes:
            if name.startswith(begins):
                canonical = should + name[len(begins) :]
                break
        else:
            if prefixes and name != OUTPUT:
                continue  # the images' part
        if canonical in tensors:
            raise FormatError(f"{weights.path}: holds {canonical} under two names, one of them {name}")
        tensors[canonical] = weights.tensors[name].changed(name=canonical)
    return tensors


def _quantization(folder: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    for key in ("quantization_config", "compression_config"):
        found = values.get(key)
        if isinstance(found, dict):
            return found
        if found is not None:
            raise FormatError(f"{folder / CONFIG}: {key} must be a mapping")
    for name, method in _OLD_QUANTIZATION.items():
        if (folder / name).is_file():
            return {"quant_method": method, **read_object(folder / name)}
    return None


def _tied(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Settles files whose config ties the output matrix to the embedding, but which store both.

    As transformers does: where the two differ the config is wrong, otherwise one is enough.
    """
    if not config.tie_word_embeddings or OUTPUT not in tensors or EMBEDDING not in tensors:
        return config, tensors
    if not _equal(tensors[EMBEDDING], tensors[OUTPUT]):
        return replace(config, tie_word_embeddings=False), tensors
    return config, {name: tensor for name, tensor in tensors.items() if name != OUTPUT}


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.encoding != other.encoding:
        return False
    first, second = one.data, other.data
    return all(
        np.array_equal(first[at : at + _COMPARED], second[at : at + _COMPARED])
        for at in range(0, first.size, _COMPARED)
    )
