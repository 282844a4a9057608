"""Recipe: which tensor gets which encoding, and by which method, as data.

A recipe is a TOML file in ``recipes/``, or a user's own:

    description = "4-bit K types, more bits where it matters (llama.cpp's Q4_K_M)"
    to = "gguf"
    encoding = "q4_k"                  # of every matrix that no rule names

    [[rules]]                          # of several that fit, the first counts
    tensors = ["*.down_proj.weight"]   # patterns of canonical names; "output", "embedding"
    layers = "more-bits"               # which layers; all where it is left out
    encoding = "q6_k"

``output`` is the matrix of the logits, also where it is the embedding; ``embedding`` is one that is not
the output too. Further conditions: ``query_groups`` (least number of query heads that share a key head),
``importance`` (whether an importance matrix is given). Layers, of ``n``: ``first-K``; ``first-eighth`` and
``first-sixteenth`` (``i < n / 8``); ``middle`` (all but the first and last eighth); ``more-bits`` (the first
and last eighth and every third between), which are llama.cpp's choices (``llama-quant.cpp``).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.convert.rules import is_matrix
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.huggingface.quantized import METHODS as PACKINGS
from nybble.formats.onnx.targets import TARGETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
"""How weights are rounded: to nearest; with AWQ's scales; with GPTQ's error feedback; with both. All but the
first calibrate."""
KEEP = "keep"
"""In place of an encoding: the tensor stays as it is."""
OUTPUT, EMBEDDING = "output", "embedding"
"""Names in rules for what two or one tensors may be."""

LEAST_GROUP = 16
"""Of affine encodings: smaller groups have scales that cost more than they gain."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FIRST = re.compile(r"first-([1-9]\d{0,3})")
_LAYERS = ("first-eighth", "first-sixteenth", "middle", "more-bits")
_TO = ("gguf", "safetensors", "onnx", *TARGETS)
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_RECIPE_KEYS = {"description", "to", "encoding", "method", "quantization", "rules"}
_RULE_KEYS = {"tensors", "layers", "encoding", "query_groups", "importance"}

FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""What takes the place of a type of 256 elements in rows that they do not divide; llama.cpp's choice."""


@dataclass(frozen=True)
class Rule:
    """Tensors that get an encoding of their own."""

    tensors: tuple[str, ...]
    encoding: str
    layers: str | None = None
    query_groups: int = 1
    importance: bool | None = None

    def fits(self, name: str, *, layer: int | None, config: ModelConfig, importance: bool) -> bool:
        """Whether it is for the tensor of this name, which may be ``output`` or ``embedding``."""
        groups = config.num_attention_heads // max(1, config.num_key_value_heads)
        return (
            any(fnmatchcase(name, pattern) for pattern in self.tensors)
            and groups >= self.query_groups
            and self.importance in (None, importance)
            and (self.layers is None or (layer is not None and in_layers(self.layers, layer, config)))
        )


@dataclass(frozen=True)
class Recipe:
    """What every matrix of a model becomes."""

    name: str
    description: str
    to: str
    """The format or ONNX target that it is made for."""
    encoding: str
    method: str = "rtn"
    rules: tuple[Rule, ...] = ()
    quantization: str | None = None
    """For safetensors: how integers are packed; None: as compressed-tensors."""

    def encodings_for(
        self,
        checkpoint: Checkpoint,
        *,
        to: str = "gguf",
        packing: str | None = None,
        importance: bool = False,
        named: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """The encoding of every matrix, by name; those that stay as they are are left out.

        Args:
            checkpoint: the model.
            to: the format or ONNX target: ``fitted_to`` says what it changes.
            packing: of safetensors; AWQ and GPTQ have one group size for all matrices.
            importance: whether an importance matrix is given.
            named: encodings by name that come before the rules; also of tensors that are no matrices.

        Raises:
            UnsupportedError: rows are no multiple of a block size, and nothing takes its place.
        """
        found: dict[str, str] = {}
        for tensor in checkpoint.tensors.values():
            name = (named or {}).get(tensor.name)
            if name is None and is_matrix(tensor):
                wanted = self.wanted(tensor, checkpoint.config, importance=importance)
                if wanted != KEEP:
                    output = _called(tensor.name, checkpoint.config) == OUTPUT
                    name = dividing(fitted_to(wanted, to), tensor, output=output)
            if name is not None and name != KEEP:
                found[tensor.name] = name
        return _with_one_group(found) if packing in ("awq", "gptq") else found

    def encoding_of(self, tensor: Tensor, config: ModelConfig, *, importance: bool = False) -> str:
        """The encoding of one matrix in GGUF.

        Raises:
            UnsupportedError: its rows are no multiple of the block size, and nothing takes its place.
        """
        wanted = self.wanted(tensor, config, importance=importance)
        return dividing(wanted, tensor, output=_called(tensor.name, config) == OUTPUT)

    def wanted(self, tensor: Tensor, config: ModelConfig, *, importance: bool = False) -> str:
        """What the rules say of one matrix, whatever its size: an encoding or ``keep``."""
        found = _LAYER.match(tensor.name)
        layer = int(found[1]) if found else None
        name = _called(tensor.name, config)
        fitting = (
            rule for rule in self.rules if rule.fits(name, layer=layer, config=config, importance=importance)
        )
        return next((rule.encoding for rule in fitting), self.encoding)


def in_layers(which: str, layer: int, config: ModelConfig) -> bool:
    """Whether a layer is among those that a rule names."""
    count = config.num_hidden_layers
    first = _FIRST.fullmatch(which)
    if first:
        return layer < int(first[1])
    eighth = count // 8
    if which == "first-eighth":
        return layer < eighth
    if which == "first-sixteenth":
        return layer < count // 16
    if which == "middle":
        return eighth <= layer < 7 * count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2


def read_recipe(name_or_path: str) -> Recipe:
    """A recipe by its name in any case, as ``Q4_K_M``, or a user's file (``.toml``).

    ``q3_k``, ``q4_k`` and ``q5_k`` are the mixes with ``_m``, as for llama.cpp's tool.

    Raises:
        NotFoundError: there is none; the message lists the names.
        FormatError: the file says something that recipes do not have.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise NotFoundError(f"{path}: no such recipe")
        return parse_recipe(path.read_bytes(), path.stem, str(path))
    name = name_or_path.lower()
    name = _ALIASES.get(name, name)
    file = resources.files("nybble.quantize") / "recipes" / f"{name}.toml"
    if not re.fullmatch(r"[a-z0-9_-]+", name) or not file.is_file():
        raise NotFoundError(
            f"unknown recipe {name_or_path!r}; known: {', '.join(recipe_names())}; or a file, NAME.toml"
        )
    return parse_recipe(file.read_bytes(), name, name)


def recipe_names() -> list[str]:
    """All recipes that nybble has, sorted."""
    folder = resources.files("nybble.quantize") / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def parse_recipe(data: bytes, name: str, where: str) -> Recipe:
    """A recipe from TOML.

    Raises:
        FormatError: it is no TOML, or says something that recipes do not have; the message has the place.
    """
    try:
        values = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{where}: is no TOML: {error}") from None
    except RecursionError:
        raise FormatError(f"{where}: is no recipe: its lists are nested too deeply") from None
    _check_keys(values, _RECIPE_KEYS, where)
    rules = values.get("rules", [])
    if not isinstance(rules, list):
        raise FormatError(f"{where}: rules is a list of tables: [[rules]]")
    to = _text(values, "to", where, "gguf")
    if to not in _TO:
        raise FormatError(f"{where}: to is one of {', '.join(_TO)}, not {to!r}")
    method = _text(values, "method", where, "rtn")
    if method not in METHODS:
        raise FormatError(f"{where}: method is one of {', '.join(METHODS)}, not {method!r}")
    return Recipe(
        name=name,
        description=_text(values, "description", where, ""),
        to=to,
        encoding=_encoding(values, where),
        method=method,
        quantization=_packing(values, where),
        rules=tuple(_rule(rule, f"{where}: rule {i + 1}") for i, rule in enumerate(rules)),
    )


def _rule(values: object, where: str) -> Rule:
    if not isinstance(values, dict):
        raise FormatError(f"{where}: is a table")
    _check_keys(values, _RULE_KEYS, where)
    tensors = values.get("tensors")
    if isinstance(tensors, str):
        tensors = [tensors]
    if not isinstance(tensors, list) or not tensors or not all(isinstance(item, str) for item in tensors):
        raise FormatError(f"{where}: tensors is a list of patterns of names")
    layers = values.get("layers")
    known = layers is None or (
        isinstance(layers, str) and (layers in _LAYERS or _FIRST.fullmatch(layers) is not None)
    )
    if not known:
        raise FormatError(f"{where}: layers is first-K or one of {', '.join(_LAYERS)}, not {layers!r}")
    groups, importance = values.get("query_groups", 1), values.get("importance")
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise FormatError(f"{where}: query_groups is a whole number from 1 on, not {groups!r}")
    if importance is not None and not isinstance(importance, bool):
        raise FormatError(f"{where}: importance is true or false, not {importance!r}")
    return Rule(tuple(tensors), _encoding(values, where), layers, groups, importance)


def _packing(values: Mapping[str, Any], where: str) -> str | None:
    found = _text(values, "quantization", where, "")
    if found not in ("", *PACKINGS):
        raise FormatError(f"{where}: quantization is one of {', '.join(PACKINGS)}, not {found!r}")
    return found or None


def _encoding(values: Mapping[str, Any], where: str) -> str:
    name = _text(values, "encoding", where, None)
    if name == KEEP:
        return name
    try:
        encoding(name)
    except UnsupportedError as error:
        raise FormatError(f"{where}: {error}") from None
    return name


def _text(values: Mapping[str, Any], key: str, where: str, default: str | None) -> str:
    found = values.get(key, default)
    if not isinstance(found, str):
        raise FormatError(f"{where}: {key} is a text" + (", and it is missing" if found is None else ""))
    return found


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(values) - known):
        raise FormatError(f"{where}: unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def _called(name: str, config: ModelConfig) -> str:
    if name == "lm_head.weight":
        return OUTPUT
    if name == "model.embed_tokens.weight":
        return OUTPUT if config.tie_word_embeddings else EMBEDDING
    return name


def fitted_to(name: str, to: str) -> str:
    """What an encoding of integers in groups is in a target; others are the same in all.

    In ONNX scales have the type of the activations. GGUF has types of its own: of 4 bits ``q4_0``, with zero
    points ``q4_1``; of 8, 3 and 2 ``q8_0``, ``q3_k`` and ``q2_k``.
    """
    form = affine_format(name)
    if form is None:
        return name
    if to == "gguf":
        return {2: "q2_k", 3: "q3_k", 8: "q8_0"}.get(form.bits, "q4_1" if form.has_zero_point else "q4_0")
    if to in TARGETS or to == "onnx":
        scale = TARGETS[to].element_type if to in TARGETS else "f32"
        return replace(form, scale=scale).name
    return name


def dividing(wanted: str, tensor: Tensor, *, output: bool = False) -> str:
    """The wanted encoding, or what takes its place where it does not divide the rows.

    Groups are halved down to 16; GGUF's types of 256 have others in their place (``FALLBACKS``).

    Raises:
        UnsupportedError: nothing takes its place.
    """
    for name in _chain(wanted, output):
        if tensor.shape[-1] % encoding(name).block_size == 0:
            return name
    raise UnsupportedError(
        f"{tensor.name}: rows of {tensor.shape[-1]} are no multiple of {wanted}'s blocks of"
        f" {encoding(wanted).block_size}; name another encoding for it"
    )


def _chain(name: str, output: bool) -> Iterator[str]:
    """The encoding and what takes its place, the last one float16 where blocks are GGUF's."""
    yield name
    form = affine_format(name)
    while form is not None and form.group_size % 2 == 0 and form.group_size > LEAST_GROUP:
        form = replace(form, group_size=form.group_size // 2)
        yield form.name
    if name in FALLBACKS:
        yield "q8_0" if output else FALLBACKS[name]
    if encoding(name).ggml_type is not None:
        yield "f16"


def _with_one_group(names: Mapping[str, str]) -> dict[str, str]:
    """The same with one group size: the largest that divides all."""
    forms = {name: affine_format(kind) for name, kind in names.items()}
    sizes = [form.group_size for form in forms.values() if form is not None]
    size = math.gcd(*sizes)
    return {
        name: kind if form is None else replace(form, group_size=size).name
        for (name, kind), form in zip(names.items(), forms.values(), strict=True)
    }
