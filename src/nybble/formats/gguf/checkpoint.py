"""A GGUF file as a Checkpoint: config, canonical tensor names, tokenizer and chat templates.

Nothing is copied: tensors stay views of the mapped file, each with its canonical name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, NybbleError, UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.gguf.config import read_config
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.gguf.names import canonical_name
from nybble.formats.gguf.reader import GGUFFile
from nybble.text.tokenizer import GGUFTokenizerSource

_TOKENIZER = "tokenizer.ggml.model"
_TEMPLATE = "tokenizer.chat_template"


class CanonicalTensors(Mapping[str, Tensor]):
    """The weights of a GGUF file by canonical name; each look-up makes a view."""

    def __init__(self, architecture: str, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._names: dict[str, str] = {}
        for name in tensors:
            canonical = canonical_name(architecture, name)
            if canonical is not None:
                self._names[canonical] = name

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]].changed(name=name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_gguf_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a GGUF file (of a split one, any part) as a model.

    The file stays mapped as long as a tensor of it is in use.

    Raises:
        NotFoundError: no such file.
        FormatError: not a valid GGUF file, or metadata that is missing, mistyped or out of range.
        UnsupportedError: an architecture, tokenizer or feature that is not known.
    """
    file = GGUFFile.open(path)
    try:
        return gguf_checkpoint(file)
    except NybbleError:
        file.close()
        raise


def gguf_checkpoint(file: GGUFFile) -> Checkpoint:
    """The model that an open file holds."""
    where = str(file.path or "<memory>")
    if file.metadata.get("general.type") == "adapter":
        raise UnsupportedError(f"{where}: is a LoRA adapter and no model: name the model that it belongs to")
    config = read_config(file.metadata, file.tensors, where)
    template, named = _chat_templates(file.metadata, where)
    metadata = GGUFMetadata(file.metadata, file.value_types)
    return Checkpoint(
        config=config,
        tensors=CanonicalTensors(config.architecture, file.tensors),
        tokenizer=GGUFTokenizerSource(metadata) if _TOKENIZER in file.metadata else None,
        chat_template=template,
        chat_templates=named,
        metadata=metadata,
        source=None if file.path is None else Path(file.path),
        format="gguf",
        name=Fields(file.metadata, where).string("general.name", ""),
    )


def _chat_templates(metadata: Mapping[str, object], where: str) -> tuple[str | None, dict[str, str]]:
    """The default template and the named ones (``tokenizer.chat_template.tool_use``, ...)."""
    templates: dict[str, str] = {}
    for key, value in metadata.items():
        if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
            if not isinstance(value, str):
                raise FormatError(f"{where}: {key} must be text")
            templates[key[len(_TEMPLATE) + 1 :]] = value
    return templates.pop("", None), templates
