"""A Checkpoint as a GGUF file: the reverse of ``checkpoint.py``.

The checkpoint is in GGUF form (``checkpoint/forms.py`` makes it so), and every tensor has an encoding
that GGUF has. Nothing is computed here but the metadata: bytes of tensors go to the file as they are.

Metadata that came from a GGUF file is kept, in its order and with its types, as far as it still says
what the checkpoint is; so a file that is read and written again is the same file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.tensor import Tensor
from nybble.errors import NybbleError
from nybble.formats.gguf.config import read_config
from nybble.formats.gguf.general_keys import (
    QUANTIZATION_VERSION,
    file_type,
    fits_file_type,
    is_quantized,
    sampling_keys,
    size_label,
)
from nybble.formats.gguf.llama_cpp_notes import llama_cpp_notes
from nybble.formats.gguf.metadata import GGUFMetadata, metadata_types
from nybble.formats.gguf.names import LAYER_NAMES, gguf_name
from nybble.formats.gguf.write_config import (
    check_config,
    config_metadata,
    config_tensors,
    differences,
    require_gguf_form,
)
from nybble.formats.gguf.writer import write_file
from nybble.formats.output import Note, Progress, unheard

_ARCHITECTURE = "general.architecture"
_NAME = "general.name"
_PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
_FILE_TYPE = "general.file_type"
_QUANTIZATION_VERSION = "general.quantization_version"
_TOKENIZER = "tokenizer."
_TEMPLATE = "tokenizer.chat_template"
_TEMPLATE_NAMES = "tokenizer.chat_templates"
_NOT_GGUF = ("split.", "huggingface.", "onnx.", "gguf.")
"""Keys of a split that is made anew, and what readers and forms note for other formats."""
_TIED = "lm_head.weight"


def write_gguf(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    split_bytes: int | None = None,
    progress: Progress | None = None,
    note: Note = unheard,
) -> list[Path]:
    """Writes a checkpoint as a GGUF file, or as several.

    Args:
        checkpoint: in GGUF form, every tensor in an encoding that GGUF has. Its output matrix is left
            out where the config says that it is the embedding.
        path: the file; see ``writer.write_file`` for the names of parts.
        split_bytes: most bytes of tensors in one file; None: one file.
        progress: called with the bytes of tensors that are written, and all that will be.
        note: called with each sentence about what GGUF cannot say of this model's tokenizer, and what
            llama.cpp does otherwise with such a model.

    Returns:
        The files that were written.

    Raises:
        ValueError: another form than GGUF's, an encoding that GGUF does not have, or a vector that is
            not f32, as llama.cpp needs it; the message names the tensor.
        UnsupportedError: GGUF has no name for a tensor, or no keys for the config.
    """
    checkpoint.require_no_adapters()
    tensors = gguf_tensors(checkpoint)
    metadata = gguf_metadata(checkpoint, tensors, note)
    for sentence in llama_cpp_notes(checkpoint.config):
        note(sentence)
    return write_file(Path(path), metadata, tensors, split_bytes=split_bytes, progress=progress)


def gguf_tensors(checkpoint: Checkpoint) -> list[Tensor]:
    """The tensors of the file with GGUF names, in the file's order; no data is read.

    Those of a GGUF source keep their order, others are sorted by layer.

    Raises:
        ValueError, UnsupportedError: as ``write_gguf``.
    """
    config = checkpoint.config
    require_gguf_form(config)
    weights = []
    for name, tensor in checkpoint.tensors.items():
        if name == _TIED and config.tie_word_embeddings:
            continue
        _check_encoding(name, tensor)
        weights.append(tensor.changed(name=gguf_name(config.architecture, name)))
    if checkpoint.format != "gguf":
        order = list(LAYER_NAMES[config.architecture])
        weights.sort(key=lambda tensor: _place(tensor.name, order))
    return [*config_tensors(config), *weights]


def _check_encoding(name: str, tensor: Tensor) -> None:
    encoding = tensor.encoding.name
    if tensor.encoding.ggml_type is None:
        raise ValueError(f"{name}: GGUF does not have the encoding {encoding}; convert the tensor before")
    if len(tensor.shape) == 1 and encoding != "f32":
        raise ValueError(f"{name}: is {encoding}, but llama.cpp needs vectors (norms and biases) as f32")


def _place(name: str, order: Sequence[str]) -> tuple[int, int, int, str]:
    """Sorts GGUF names: the embedding, the layers in order, what comes after them."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if match is not None:
        # A bias comes after its weight.
        return 1, int(match[1]), order.index(match[2]) * 2 + (match[3] == "bias"), name
    return 0 if name.startswith("token_embd.") else 2, 0, int(name.startswith("output.")), name


def gguf_metadata(checkpoint: Checkpoint, tensors: Sequence[Tensor], note: Note = unheard) -> GGUFMetadata:
    """The metadata of the file; ``tensors`` as ``gguf_tensors`` gives them, ``note`` as for ``write_gguf``.

    Raises:
        ValueError: the checkpoint is not in GGUF form.
        UnsupportedError: GGUF has no keys for the config.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    is_kept = _ARCHITECTURE in checkpoint.metadata
    values = _kept(checkpoint, by_name) if is_kept else _new(checkpoint, tensors)
    _describe_encodings(values, tensors)
    _add_tokenizer(checkpoint, values, note)
    if not is_kept:
        _avoid_phi3_name(values)
    check_config(checkpoint.config, values, by_name)
    return GGUFMetadata(values, _types(checkpoint, values))


def _types(checkpoint: Checkpoint, values: Mapping[str, object]) -> dict[str, str]:
    """The types of the values that are still a source's own."""
    origins = [checkpoint.metadata, getattr(checkpoint.tokenizer, "metadata", {})]
    return {
        key: name
        for origin in origins
        for key, name in metadata_types(origin).items()
        if key in values and values[key] is origin[key]
    }


def _new(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> dict[str, object]:
    """General keys and the config's, for a checkpoint that was no GGUF file."""
    keys = config_metadata(checkpoint.config)
    values: dict[str, object] = {_ARCHITECTURE: keys[_ARCHITECTURE], "general.type": "model"}
    if checkpoint.name:
        values[_NAME] = checkpoint.name
    if tensors:
        values["general.size_label"] = size_label(tensors)
    values |= sampling_keys(checkpoint.metadata.get("huggingface.generation_config"))
    return values | keys


def _kept(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The source's keys, with the config's replaced where they do not say the same any more."""
    config = checkpoint.config
    values = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(_NOT_GGUF)}
    architecture = values[_ARCHITECTURE]
    try:
        if not differences(config, read_config(values, tensors, "GGUF metadata")):
            return values
    except NybbleError:
        pass  # they describe another model: written anew
    fresh = config_metadata(config)
    kept: dict[str, object] = {}
    for key, value in values.items():
        if key == _ARCHITECTURE:
            kept[key] = fresh.pop(_ARCHITECTURE)
        elif not key.startswith(f"{architecture}."):
            kept[key] = value
        else:
            kept |= fresh  # all at once, where the first of the old ones was
    return kept | fresh


def _describe_encodings(values: dict[str, object], tensors: Sequence[Tensor]) -> None:
    """File type and quantization version, unless the source's still hold."""
    if fits_file_type(values.get(_FILE_TYPE), tensors):
        return
    number = file_type(tensors)
    if number is None:
        values.pop(_FILE_TYPE, None)
    else:
        values[_FILE_TYPE] = number
    if is_quantized(tensors):
        values.setdefault(_QUANTIZATION_VERSION, QUANTIZATION_VERSION)
    else:
        values.pop(_QUANTIZATION_VERSION, None)


def _add_tokenizer(checkpoint: Checkpoint, values: dict[str, object], note: Note) -> None:
    """Tokenizer and chat templates: the source's own keys, or what ``text/write_gguf.py`` makes."""
    from nybble.text.tokenizer import GGUFTokenizerSource

    tokenizer = checkpoint.tokenizer
    if isinstance(tokenizer, GGUFTokenizerSource):
        own = {key: value for key, value in tokenizer.metadata.items() if _of_tokenizer(key)}
        present = {key: value for key, value in values.items() if _of_tokenizer(key)}
        if own.keys() != present.keys() or any(present[key] is not own[key] for key in own):
            for key in present:
                del values[key]
            values |= own
    elif tokenizer is not None:
        from nybble.text.write_gguf import gguf_tokenizer

        for key in [key for key in values if key.startswith(_TOKENIZER)]:
            del values[key]
        made = gguf_tokenizer(checkpoint)
        values |= made.metadata
        for sentence in made.notes:
            note(sentence)
    _set_templates(checkpoint, values)


def _avoid_phi3_name(values: dict[str, object]) -> None:
    """Takes "phi3" out of the name of a model whose vocabulary is not Phi-3's.

    llama.cpp looks at the name, and does not load a file whose vocabulary lacks the tokens that it then
    expects (``llama-vocab.cpp``, token attributes).
    """
    name, tokens = values.get(_NAME), values.get("tokenizer.ggml.tokens")
    if isinstance(name, str) and isinstance(tokens, Sequence) and re.search("phi-?3", name, re.IGNORECASE):
        known = set(tokens)
        if not known.issuperset(_PHI3_TOKENS):
            values[_NAME] = re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


def _set_templates(checkpoint: Checkpoint, values: dict[str, object]) -> None:
    """The checkpoint's templates, where the keys do not hold them already."""
    wanted = {f"{_TEMPLATE}.{name}": text for name, text in checkpoint.chat_templates.items()}
    if checkpoint.chat_template is not None:
        wanted[_TEMPLATE] = checkpoint.chat_template
    held = {key: text for key, text in values.items() if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")}
    if held == wanted:
        return
    for key in held.keys() - wanted.keys():
        del values[key]
    values |= wanted
    if checkpoint.chat_templates:
        values[_TEMPLATE_NAMES] = sorted(checkpoint.chat_templates)
    else:
        values.pop(_TEMPLATE_NAMES, None)


def _of_tokenizer(key: str) -> bool:
    """Whether a key describes the tokenizer, templates excepted."""
    return key.startswith(_TOKENIZER) and not key.startswith(_TEMPLATE)
