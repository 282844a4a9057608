"""PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA only.

Names are ``base_model.model.<module>.lora_A.weight`` and ``.lora_B.weight`` (of the embedding
``lora_embedding_A`` and ``lora_embedding_B``), the module being the base model's. What changes the
model in other ways than B @ A (DoRA, biases, modules saved whole) is refused: without it the answers
would be wrong.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint and PEFT's ``LoraConfig``.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nybble.checkpoint.adapter import EMBEDDING, Adapter, LoraPair, lora_pair
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.huggingface.adapter_patterns import MAX_NAME, Patterns
from nybble.formats.json_text import read_object, write_object
from nybble.formats.safetensors.reader import read_safetensors
from nybble.formats.safetensors.writer import DTYPES, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MATRIX = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])(?:\.default)?\.weight|lora_embedding_(?P<outer>[AB])(?:\.default)?)"
)
_BASE_LAYER = ".base_layer.weight"
"""The base model's own matrix, which PEFT saves too where the embedding or the output has an adapter."""
_PREFIX = "base_model.model."
_TEXT_PARTS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
)
"""Where models of text and images have their language model."""

# What LoraConfig may ask for besides B @ A, and what it means.
_REFUSED = {
    "use_dora": "DoRA (a learned length of each row)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias of B",
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "modules that are saved whole",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "parameters that are no linear layers",
    "alora_invocation_tokens": "aLoRA (on from certain tokens)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of ``init_lora_weights`` that change the base model's weights too."""


def read_peft_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Opens a PEFT folder; its matrices are views of the mapped file.

    Args:
        path: the folder, or one of its two files.
        name: the adapter's; None: the folder's.

    Raises:
        NotFoundError: a file is missing.
        FormatError: a file is damaged, or matrices do not belong together.
        UnsupportedError: no LoRA, or one with parts that are not plain LoRA; the message names them.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    where = str(folder / CONFIG)
    values = read_object(folder / CONFIG)
    _check_config(values, where)
    if not (folder / WEIGHTS).is_file() and (folder / _PICKLE).is_file():
        raise UnsupportedError(
            f"{folder}: has its weights as a pickle file ({_PICKLE}), which can run code when it is read;"
            f" nybble reads safetensors: save the adapter again with PEFT"
        )
    if not (folder / WEIGHTS).is_file():
        raise NotFoundError(f"{folder / WEIGHTS}: no such file; a PEFT folder has it beside {CONFIG}")
    weights = read_safetensors(folder / WEIGHTS)
    scales = _Scales(values, where)
    modules: dict[str, str] = {}
    matrices: dict[str, dict[str, Tensor]] = {}
    for key in weights.infos:
        if key.endswith(_BASE_LAYER):
            continue
        module, letter, weight = _matrix(key, str(folder / WEIGHTS))
        found = matrices.setdefault(weight, {})
        if letter in found:
            raise FormatError(f"{folder / WEIGHTS}: holds {letter} of {weight} twice")
        found[letter] = weights.tensors[key].changed(name=f"{weight}.{letter}")
        modules[weight] = module
    if not matrices:
        raise FormatError(f"{folder / WEIGHTS}: holds no LoRA matrices")
    pairs: dict[str, LoraPair] = {}
    for weight, found in matrices.items():
        pair = lora_pair(where, weight, found.get("A"), found.get("B"))
        pairs[weight] = replace(pair, scale=scales.of(modules[weight], pair.rank))
    return Adapter(name or folder.resolve().name, pairs, metadata={"peft.config": values}, source=folder)


def _check_config(values: Mapping[str, Any], where: str) -> None:
    kind = Fields(values, where).string("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(f"{where}: peft_type is {kind[:40]!r}; LORA alone is supported")
    for key, what in _REFUSED.items():
        if values.get(key) not in (None, False, [], {}, ""):
            raise UnsupportedError(f"{where}: {key}: {what} cannot be applied here; plain LoRA can")
    if Fields(values, where).string("bias", "none") != "none":
        raise UnsupportedError(f"{where}: bias is {values['bias']!r:.40}; trained biases are not supported")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASES):
        raise UnsupportedError(
            f"{where}: init_lora_weights is {start[:40]!r}, so the adapter belongs to changed base weights;"
            " save it as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _matrix(key: str, where: str) -> tuple[str, str, str]:
    """The module, A or B, and the canonical name of the weight, of a tensor's name."""
    match = _MATRIX.fullmatch(key)
    if match is None or len(key) > MAX_NAME:
        raise UnsupportedError(
            f"{where}: the tensor {key[:200]!r} is no matrix of LoRA; without it the answers would be wrong"
        )
    module = match["module"].removeprefix(_PREFIX)
    canonical = module
    for begins, should in _TEXT_PARTS:
        if module.startswith(begins):
            canonical = should + module[len(begins) :]
    weight = f"{canonical}.weight"
    if (match["outer"] is not None) != (weight == EMBEDDING):
        raise UnsupportedError(f"{where}: the tensor {key[:200]!r} is not supported for this kind of module")
    return module, match["letter"] or match["outer"], weight


class _Scales:
    """The scale of each pair, as the config says."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        fields = Fields(values, where)
        self._alpha = _alpha(fields, "lora_alpha", 8.0)
        self._root = fields.boolean("use_rslora", False)
        given = values.get("alpha_pattern") or {}
        if not isinstance(given, Mapping):
            raise FormatError(f"{where}: alpha_pattern must be a mapping")
        self._patterns = Patterns(given, f"{where}: alpha_pattern")
        named = Fields(given, f"{where}: alpha_pattern")
        self._by_pattern = {pattern: _alpha(named, pattern) for pattern in given}

    def of(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        pattern = self._patterns.first(module)
        alpha = self._alpha if pattern is None else self._by_pattern[pattern]
        return alpha / (math.sqrt(rank) if self._root else rank)


def _alpha(fields: Fields, key: str, default: Any = ...) -> float:
    # One below 0 turns the change around, which PEFT allows.
    value: float = fields.number(key, default, minimum=-1e9, maximum=1e9)
    return value


# -- writing -----------------------------------------------------------------------------------------


def write_peft_adapter(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a PEFT folder; the matrices' bytes go to it as they are. Returns the files.

    Args:
        adapter: with q's and k's rows as transformers has them, in f32, f16 or bf16.
        folder: an existing folder; files of the same names are replaced.

    Raises:
        ValueError: another order of rows, or an encoding that safetensors does not have.
    """
    if adapter.interleaved:
        raise ValueError(f"adapter {adapter.name!r} has q and k rows as GGUF; with_rows changes that")
    tensors: dict[str, Tensor] = {}
    for weight, pair in adapter.pairs.items():
        module = f"{_PREFIX}{weight.removesuffix('.weight')}"
        for letter, tensor in (("A", pair.a), ("B", pair.b)):
            if tensor.encoding.name not in DTYPES:
                raise ValueError(f"{weight}: safetensors has no dtype for {tensor.encoding.name}")
            end = f"lora_embedding_{letter}" if weight == EMBEDDING else f"lora_{letter}.weight"
            tensors[f"{module}.{end}"] = tensor
    write_safetensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_object(folder / CONFIG, peft_config(adapter))
    return [folder / CONFIG, folder / WEIGHTS]


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json: the most common rank and alpha, and patterns for the others."""
    modules = {name.removesuffix(".weight"): pair for name, pair in adapter.pairs.items()}
    alphas = {module: as_alpha(pair) for module, pair in modules.items()}
    rank = Counter(pair.rank for pair in modules.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    source = adapter.metadata.get("peft.config")
    base = source.get("base_model_name_or_path") if isinstance(source, Mapping) else None
    return {
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {m: pair.rank for m, pair in modules.items() if pair.rank != rank},
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def as_alpha(pair: LoraPair) -> float | int:
    """A pair's alpha as files have it: float32, and a whole number where it is one."""
    value = float(np.float32(pair.alpha))
    return int(value) if value.is_integer() else value
