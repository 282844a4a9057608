"""ONNX decoders as checkpoints: config and weights are recovered from the graph itself.

Models of onnxruntime-genai's model builder, of nybble and of the usual exporters are recognised; a
model that is not can still be run as it is by the device ``onnxruntime``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.errors import FormatError, NybbleError, UnsupportedError
from nybble.formats.fields import MAX_INTEGER, Fields
from nybble.formats.huggingface.config import read_config
from nybble.formats.huggingface.templates import read_chat_templates
from nybble.formats.json_text import read_object_if_there
from nybble.formats.onnx import folder as folders
from nybble.formats.onnx.decoder_io import USUAL_CACHES, USUAL_INPUTS
from nybble.formats.onnx.external_data import ExternalFiles
from nybble.formats.onnx.portable_embedding import with_plain_embedding
from nybble.formats.onnx.proto import input_shape, load_model
from nybble.formats.onnx.recognise import arithmetic, fused, minima, movement
from nybble.formats.onnx.recognise.layout import features_of
from nybble.formats.onnx.recognise.model import Hints, Recognised, build
from nybble.formats.onnx.recognise.probe import RUN_INSTEAD, GraphTable, Probe
from nybble.formats.onnx.recognise.structure import read_decoder
from nybble.formats.onnx.recognise.values import Known, Term, Value, View

if TYPE_CHECKING:
    import onnx

RULES = {**movement.RULES, **arithmetic.RULES, **fused.RULES, **minima.RULES}
PAST, TOKENS = 1, 4
"""The run that is recognised. Position 0 is left out: nothing is rotated there."""
CONFIG_KEY = "nybble.config"
"""Key of ``metadata_props`` under which nybble's files keep their config."""
METADATA_ACCURACY = "onnx.accuracy_levels"


def read_onnx_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens an ONNX decoder, a file or its folder, as a model.

    Weights stay in their files, mapped; packings become affine encodings when they are first used.
    The checkpoint has ONNX form: q and k rows as Hugging Face's, norms with everything baked in.

    Raises:
        NotFoundError: there is no ONNX model.
        FormatError: a damaged or hostile file.
        UnsupportedError: a graph that is not recognised (the message names the node), or the package
            onnx is missing.
    """
    file, genai = folders._decoder_file(Path(path))
    folder = folders._folder_of_config(file)
    values = read_object_if_there(folder / "config.json")
    recognised = recognise(load_model(file), file, genai, values)
    decoder = _Beside(genai)
    generation = read_object_if_there(folder / "generation_config.json") or folders._search_options(decoder)  # type: ignore[arg-type]
    template, named = read_chat_templates(folder)
    metadata: dict[str, object] = {METADATA_ACCURACY: list(recognised.accuracy_levels)}
    for key, found in (
        ("onnx.genai_config", dict(genai)),
        ("huggingface.config", values),
        ("huggingface.generation_config", generation),
    ):
        if found:
            metadata[key] = found
    has_tokenizer = (folder / "tokenizer.json").is_file()
    ends = folders._end_tokens(decoder)  # type: ignore[arg-type]
    return Checkpoint(
        config=recognised.config,
        tensors=recognised.tensors,
        tokenizer=folders.OnnxFolderTokenizerSource(folder, ends) if has_tokenizer else None,
        chat_template=template,
        chat_templates=named,
        metadata=metadata,
        source=Path(path),
        format="onnx",
        name=folder.resolve().name,
    )


@dataclass(frozen=True)
class _Beside:
    """What the helpers of ``folder`` look at."""

    genai: Mapping[str, Any]


def recognise(
    model: onnx.ModelProto, file: Path | None, genai: Mapping[str, Any], values: Mapping[str, Any]
) -> Recognised:
    """Config and tensors of a model that is already parsed.

    Args:
        model: without external data.
        file: where it lies, for external data; None: in memory, without external data.
        genai: parsed ``genai_config.json``, or empty.
        values: parsed ``config.json``, or empty.
    """
    where = str(file or "<memory>")
    model = with_plain_embedding(model)
    table = GraphTable(model.graph, ExternalFiles(None if file is None else file.parent), where)
    minima.mark_centres(table)
    fields = Fields(genai, where).fields("model")
    inputs = _Inputs(table, fields, where)
    runs = _Runs(table, inputs)
    past = PAST if inputs.has_caches else 0
    try:
        probe = runs.first(past)
        logits = probe.get(inputs.logits)
        if not isinstance(logits, View):
            raise FormatError(f"{where}: the logits do not depend on the tokens")
        decoder = read_decoder(features_of(logits))
        _check_outputs(table, probe, inputs, where)
        return build(decoder, runs, past, _hints(fields, values, model))
    except RecursionError:
        raise FormatError(f"{where}: operators are chained too deep") from None
    except NybbleError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error


class _Runs:
    """Made-up runs of the graph, each made once."""

    def __init__(self, table: GraphTable, inputs: _Inputs) -> None:
        self._table = table
        self._inputs = inputs
        self._probes: dict[tuple[int, int, int], Probe] = {}

    def first(self, past: int) -> Probe:
        """The run that is recognised."""
        return self._make(past, TOKENS)

    def __call__(self, past: int) -> Probe:
        """See ``Runs``. Without caches a longer sequence is more new tokens."""
        return self._make(past, TOKENS) if self._inputs.has_caches else self._make(0, past + TOKENS)

    def jump(self, length: int) -> Probe | None:
        """See ``Runs``."""
        past = PAST if self._inputs.has_caches else 0
        return self._make(past, TOKENS, length) if self._inputs.has_positions else None

    def still(self, past: int) -> Probe | None:
        """See ``Runs``."""
        if not self._inputs.has_positions:
            return None
        return self._make(past, TOKENS, 0) if self._inputs.has_caches else self._make(0, TOKENS)

    def _make(self, past: int, tokens: int, length: int = -1) -> Probe:
        key = (past, tokens, length)
        if key not in self._probes:
            values = self._inputs.values(past, tokens, length)
            self._probes[key] = Probe(self._table, values, RULES, past=past, tokens=tokens)
        return self._probes[key]


def _check_outputs(table: GraphTable, probe: Probe, inputs: _Inputs, where: str) -> None:
    """Every output is the logits or a cache carried on: nothing else is computed."""
    for name in table.outputs:
        if name == inputs.logits:
            continue
        value = probe.get(name)
        if (
            not isinstance(value, View)
            or value.base.operator not in ("present", "cache")
            or not value.is_whole
        ):
            raise UnsupportedError(f"{where}: the output {name!r} is no cache; {RUN_INSTEAD}")


def _hints(fields: Fields, values: Mapping[str, Any], model: onnx.ModelProto) -> Hints:
    stated = _stated(model)
    if stated is not None:
        locals_ = () if stated.rope_local is None else (stated.rope_local,)
        return Hints(stated.architecture, stated.max_position_embeddings, (stated.rope, *locals_), stated)
    family = values.get("model_type")
    context = fields.integer("context_length", None)
    config: ModelConfig | None = None
    if values:
        try:
            config = read_config(values)
        except NybbleError:
            config = None  # a family that is not known may still be recognised
    ropes = (
        () if config is None else (config.rope, *(() if config.rope_local is None else (config.rope_local,)))
    )
    return Hints(
        family=family if isinstance(family, str) else fields.string("type", ""),
        context_length=context or (None if config is None else config.max_position_embeddings),
        ropes=ropes,
    )


def _stated(model: onnx.ModelProto) -> ModelConfig | None:
    """The config that nybble wrote into the file; None where there is none, or it is no such config."""
    found = next((entry.value for entry in model.metadata_props if entry.key == CONFIG_KEY), None)
    if found is None or len(found) > 1 << 20:
        return None
    try:
        values = json.loads(found)
        ropes = {
            key: RopeConfig(**{name: _tuples(item) for name, item in values[key].items()})
            for key in ("rope", "rope_local")
            if values.get(key) is not None
        }
        stated = ModelConfig(**{**{name: _tuples(item) for name, item in values.items()}, **ropes})
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None  # only a hint: the graph is what counts
    limit = stated.max_position_embeddings
    usable = isinstance(stated.architecture, str) and type(limit) is int and 0 < limit <= MAX_INTEGER
    return stated if usable else None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Inputs:
    """The graph's inputs by meaning, and values for a made-up run."""

    def __init__(self, table: GraphTable, fields: Fields, where: str) -> None:
        decoder = fields.fields("decoder")
        given = decoder.fields("inputs")
        self._where = where
        self._table = table
        self._roles = {name: role for name, role in USUAL_INPUTS.items() if name in table.inputs}
        self._roles |= {name: "position_ids" for name in ("cache_position",) if name in table.inputs}
        for role in ("input_ids", "attention_mask", "position_ids"):
            if given.has(role) and given.string(role) in table.inputs:
                self._roles[given.string(role)] = role
        if "input_ids" not in self._roles.values():
            raise UnsupportedError(
                f"{where}: no input is called input_ids; nybble reads decoders of token ids"
            )
        self._head_dim = decoder.integer("head_size", 1)
        self._caches = self._find_caches(given)
        self.logits = decoder.fields("outputs").string("logits", "logits")
        if self.logits not in table.outputs:
            raise UnsupportedError(f"{where}: no output is called {self.logits}: no decoder")
        unknown = set(table.inputs) - set(self._roles) - self._caches
        if unknown:
            raise UnsupportedError(f"{where}: inputs that are not known: {', '.join(sorted(unknown)[:8])}")

    @property
    def has_caches(self) -> bool:
        """Whether keys and values of earlier tokens are inputs."""
        return bool(self._caches)

    def _find_caches(self, given: Fields) -> set[str]:
        templates = [name for row in USUAL_CACHES for name in row[:2]]
        for key in ("past_key_names", "past_value_names"):
            if given.has(key):
                templates.append(given.string(key))
        found = set()
        for template in templates:
            before, mark, after = template.partition("%d")
            for name in self._table.inputs:
                middle = name[len(before) : len(name) - len(after)]
                if mark and name.startswith(before) and name.endswith(after) and middle.isdigit():
                    found.add(name)
        return found

    @property
    def has_positions(self) -> bool:
        """Whether positions are an input."""
        return "position_ids" in self._roles.values()

    def values(self, past: int, tokens: int, length: int = -1) -> dict[str, Value]:
        """Values of all inputs for a run.

        ``length`` 0 gives the first run's positions whatever ``past`` is; above 0 the last token's
        position is length - 1.
        """
        start = past if length < 0 or not self.has_caches else PAST
        positions = np.arange(start, start + tokens, dtype=np.int64)
        if length > 0:
            positions[-1] = length - 1
        found: dict[str, Value] = {}
        for name, role in self._roles.items():
            rank = len(input_shape(self._table.inputs[name]))
            if role == "input_ids":
                found[name] = View(Term("input_ids", (), (1, tokens), name), (1, tokens))
            elif role == "attention_mask" and rank == 2:
                found[name] = Known(np.ones((1, past + tokens), np.int64))
            elif role == "position_ids" and rank in (1, 2):
                found[name] = Known(positions if rank == 1 else positions[None])
            elif role == "num_logits_to_keep":
                found[name] = Known(np.array(tokens if rank == 0 else [tokens], np.int64))
            elif role == "use_cache_branch":
                found[name] = Known(np.full((1,) * rank, True))
            else:
                raise UnsupportedError(f"{self._where}: the input {name!r} has {rank} axes")
        for name in self._caches:
            shape = list(input_shape(self._table.inputs[name]))
            if len(shape) != 4:
                raise UnsupportedError(
                    f"{self._where}: the cache {name!r} has {len(shape)} axes; 4 are known"
                )
            heads = shape[1] or 1
            full = (1, heads, past, shape[3] or self._head_dim)
            found[name] = View(Term("past", (), full, name, {"name": name}), full)
        return found
