"""An ONNX decoder folder opened to be run as it is: no weight is read and no graph is recognised.

What lies beside the model (``genai_config.json``, ``config.json``, tokenizer, chat template) becomes
a Checkpoint without tensors; the graph's inputs and outputs are described by ``decoder_io``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.huggingface.config import read_config
from nybble.formats.huggingface.templates import read_chat_templates
from nybble.formats.json_text import read_object_if_there
from nybble.formats.onnx.decoder_io import DecoderIO, decoder_io
from nybble.formats.onnx.external_data import ExternalFiles
from nybble.formats.onnx.proto import MAX_FILE, import_onnx
from nybble.text.tokenizer import FolderTokenizerSource, Tokenizer

if TYPE_CHECKING:
    import onnx

GENAI_CONFIG = "genai_config.json"
USUAL_FILES = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "onnx/model.onnx")
_OTHER_PARTS = ("encoder", "vision", "speech", "embedding", "decoder.pipeline")


@dataclass(frozen=True)
class OnnxDecoder:
    """A decoder's file, and how to call it. ``genai`` is the parsed genai_config.json or empty."""

    file: Path
    genai: Mapping[str, Any]
    io: DecoderIO
    weight_bytes: int


@dataclass(frozen=True)
class OnnxFolderTokenizerSource(FolderTokenizerSource):
    """A folder's tokenizer; ``eos`` are end tokens that genai_config.json adds."""

    eos: frozenset[int] = field(default=frozenset())

    def build(self) -> Tokenizer:
        """The tokenizer."""
        tokenizer = super().build()
        known = frozenset(token for token in self.eos if 0 <= token < tokenizer.vocab_size)
        if known - tokenizer.special.eos:
            tokenizer.special = replace(tokenizer.special, eos=tokenizer.special.eos | known)
        return tokenizer


def is_onnx(path: Path) -> bool:
    """Whether a path is an ONNX file or a folder with one."""
    if path.is_file():
        return path.suffix == ".onnx"
    return (path / GENAI_CONFIG).is_file() or any(_candidates(path))


def open_onnx_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint of a folder with an ONNX decoder, or of its ``*.onnx`` file; it has no tensors.

    The config is config.json's where that is known, else it holds what genai_config.json and the
    graph's inputs tell: ``intermediate_size`` and ``rope.theta`` are 0 then.

    Raises:
        NotFoundError: there is no ONNX model.
        FormatError: a file is damaged, or external data is outside the folder or too short.
        UnsupportedError: not a decoder of tokens with key/value caches.
    """
    path = Path(path)
    decoder = describe_decoder(path)
    folder = _folder_of_config(decoder.file)
    values = read_object_if_there(folder / "config.json")
    generation = read_object_if_there(folder / "generation_config.json") or _search_options(decoder)
    template, named = read_chat_templates(folder)
    metadata: dict[str, object] = {}
    if decoder.genai:
        metadata["onnx.genai_config"] = dict(decoder.genai)
    if values:
        metadata["huggingface.config"] = values
    if generation:
        metadata["huggingface.generation_config"] = generation
    metadata["onnx.weight_bytes"] = decoder.weight_bytes
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Checkpoint(
        config=_config(decoder, values, str(folder)),
        tensors={},
        tokenizer=OnnxFolderTokenizerSource(folder, _end_tokens(decoder)) if has_tokenizer else None,
        chat_template=template,
        chat_templates=named,
        metadata=metadata,
        source=path,
        format="onnx",
        name=folder.resolve().name,
    )


def describe_decoder(path: Path) -> OnnxDecoder:
    """The decoder's file of a folder, checked, and how to call it; raises as ``open_onnx_folder``."""
    file, genai = _decoder_file(path)
    graph, weight_bytes = _load_graph(file)
    return OnnxDecoder(file, genai, decoder_io(graph, genai, str(file)), weight_bytes)


# -- which file --------------------------------------------------------------------------------------


def _decoder_file(path: Path) -> tuple[Path, Mapping[str, Any]]:
    if path.is_file():
        genai = read_object_if_there(path.with_name(GENAI_CONFIG))
        named = Fields(genai, GENAI_CONFIG).fields("model").fields("decoder").string("filename", "")
        return path, genai if named == path.name else {}
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such file or folder")
    genai = read_object_if_there(path / GENAI_CONFIG)
    if genai:
        return _genai_file(path, genai), genai
    found = _candidates(path)
    for name in USUAL_FILES:
        if path / name in found:
            return path / name, {}
    if len(found) == 1:
        return found[0], {}
    if found:
        names = ", ".join(sorted(file.name for file in found)[:10])
        raise NotFoundError(f"{path}: holds several ONNX models, name one of its files: {names}")
    raise NotFoundError(f"{path}: holds no *.onnx file")


def _candidates(folder: Path) -> list[Path]:
    return [*folder.glob("*.onnx"), *folder.glob("onnx/model.onnx")]


def _genai_file(folder: Path, genai: Mapping[str, Any]) -> Path:
    where = str(folder / GENAI_CONFIG)
    model = Fields(genai, where).fields("model")
    for part in _OTHER_PARTS:
        section, _, key = part.rpartition(".")
        if (model.fields(section) if section else model).has(key):
            raise UnsupportedError(f"{where}: has model.{part}; nybble runs models that are one decoder")
    decoder = model.fields("decoder")
    window = decoder.fields("sliding_window")
    for key in ("slide_key_value_cache", "slide_inputs"):
        # Both default to true in onnxruntime-genai.
        if decoder.has("sliding_window") and window.boolean(key, True):
            raise UnsupportedError(f"{where}: decoder.sliding_window.{key} is true, which is not supported")
    name = decoder.string("filename", "model.onnx")
    if _is_unsafe(name):
        raise FormatError(f"{where}: decoder.filename {name!r} leads out of the folder")
    file = folder / name
    if not file.is_file():
        raise NotFoundError(f"{file}: no such file, but {GENAI_CONFIG} names it")
    return file


def _folder_of_config(file: Path) -> Path:
    """Where the tokenizer is: beside the model, or above it in folders that keep models in ``onnx/``."""
    folder = file.parent
    if folder.name == "onnx" and not (folder / "tokenizer.json").is_file():
        return folder.parent
    return folder


# -- the graph ---------------------------------------------------------------------------------------


def _load_graph(file: Path) -> tuple[onnx.GraphProto, int]:
    """The graph without external data, which is checked, and the bytes of all weights."""
    onnx = import_onnx()
    size = file.stat().st_size
    if size > MAX_FILE:
        raise FormatError(f"{file}: has {size} bytes; an ONNX file has at most {MAX_FILE}")
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception as error:  # protobuf's own, and those of onnx
        raise FormatError(f"{file}: is no ONNX model: {error}") from None
    if not graph.node:
        raise FormatError(f"{file}: is no ONNX model: it has no nodes")
    files = ExternalFiles(file.parent)
    places: dict[tuple[str, int], int] = {}  # tied matrices are two tensors with the same bytes
    for tensor in _tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place, length = _check_external(tensor, file, files)
            places[place] = max(length, places.get(place, 0))
    return graph, size + sum(places.values())


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


def _check_external(
    tensor: onnx.TensorProto, file: Path, files: ExternalFiles
) -> tuple[tuple[str, int], int]:
    """Where a tensor's external data begins and how long it is; it must lie in the model's folder."""
    where = f"{file}: external data of {tensor.name[:80]!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = files.mapped(entries.get("location", "")).size
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or -1)
    except ValueError:
        raise FormatError(f"{where}: offset and length must be whole numbers") from None
    length = size - offset if length == -1 else length
    if offset < 0 or length < 0 or offset + length > size:
        raise FormatError(f"{where}: {length} bytes at {offset} are not in the file, which has {size}")
    return (entries.get("location", ""), offset), length


def _is_unsafe(location: str) -> bool:
    """Whether a relative path is empty, absolute in any system, or goes up."""
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    return (
        not location
        or "\0" in location
        or posix.is_absolute()
        or bool(windows.anchor)
        or ".." in posix.parts
        or ".." in windows.parts
    )


# -- what lies beside it -----------------------------------------------------------------------------


def _config(decoder: OnnxDecoder, values: Mapping[str, Any], where: str) -> ModelConfig:
    if values:
        try:
            return read_config(values, f"{where}: config.json")
        except UnsupportedError:
            pass  # A family that nybble does not know runs here all the same.
    io = decoder.io
    where = f"{where}: {GENAI_CONFIG}"
    model = Fields(decoder.genai, where).fields("model")
    sizes = model.fields("decoder")
    first = io.caches[0]
    heads = sizes.integer("num_attention_heads", first.heads)
    head_dim = sizes.integer("head_size", first.width)
    architecture = values.get("model_type")
    return ModelConfig(
        architecture=model.string("type", architecture if isinstance(architecture, str) else "onnx"),
        vocab_size=io.vocab_size,
        hidden_size=sizes.integer("hidden_size", heads * head_dim),
        intermediate_size=0,
        num_hidden_layers=sizes.integer("num_hidden_layers", len(io.caches) // 2),
        num_attention_heads=heads,
        num_key_value_heads=sizes.integer("num_key_value_heads", first.heads),
        head_dim=head_dim,
        max_position_embeddings=io.context_length or 0,
        rope=RopeConfig(theta=0.0, rotary_dim=head_dim),
    )


def _end_tokens(decoder: OnnxDecoder) -> frozenset[int]:
    model = decoder.genai.get("model")
    listed = model.get("eos_token_id") if isinstance(model, dict) else None
    items = listed if isinstance(listed, list) else [listed]
    return frozenset(item for item in items if isinstance(item, int) and not isinstance(item, bool))


def _search_options(decoder: OnnxDecoder) -> dict[str, Any]:
    """genai_config.json's search section as a generation_config, where it asks for sampling."""
    search = decoder.genai.get("search")
    if not isinstance(search, dict) or search.get("do_sample") is not True:
        return {}
    return {key: search[key] for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
            if key in search}  # fmt: skip
