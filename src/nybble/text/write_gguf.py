"""The tokenizer's part of GGUF metadata (``tokenizer.*``), from any source.

A GGUF file's own keys go through as they are. From a folder they are made anew and then tried: a
tokenizer that gives other ids as GGUF than from its folder is refused. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.errors import UnsupportedError
from nybble.text.gguf_tokenizer import no_garbage_collection
from nybble.text.tokenizer import FolderTokenizerSource, GGUFTokenizerSource

_TEMPLATE = "tokenizer.chat_template"


@dataclass
class GGUFTokenizer:
    """``metadata``: values as a GGUF writer takes them (str, bool, int for uint32, list of str, NumPy
    arrays). ``notes``: what GGUF cannot say about this tokenizer, a sentence each, for a report."""

    metadata: dict[str, object]
    notes: list[str] = field(default_factory=list)


def gguf_tokenizer_metadata(checkpoint: Checkpoint) -> dict[str, object]:
    """The keys ``tokenizer.*`` of the GGUF file; see ``gguf_tokenizer``."""
    return gguf_tokenizer(checkpoint).metadata


def gguf_tokenizer(checkpoint: Checkpoint) -> GGUFTokenizer:
    """The keys ``tokenizer.*`` of the GGUF file, and notes. Empty when there is no tokenizer.

    Raises:
        NotFoundError: the source folder has no tokenizer.json.
        FormatError: its files are broken, or contradict the model's config.
        UnsupportedError: a tokenizer that GGUF has no form for; the message names the part.
    """
    source = checkpoint.tokenizer
    if source is None:
        return GGUFTokenizer({})
    if isinstance(source, GGUFTokenizerSource):
        metadata = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
        templates = _templates(checkpoint)
        kept = {key: value for key, value in metadata.items() if not _is_template(key) or key in templates}
        return GGUFTokenizer({**kept, **templates})
    if isinstance(source, FolderTokenizerSource):
        from nybble.text.folder_to_gguf import folder_to_gguf

        with no_garbage_collection():
            metadata, notes = folder_to_gguf(source.folder, checkpoint.config.vocab_size)
        return GGUFTokenizer({**metadata, **_templates(checkpoint)}, notes)
    raise UnsupportedError(
        f"cannot write a tokenizer from {type(source).__name__}; from GGUF metadata or a folder it can"
    )


def _is_template(key: str) -> bool:
    return key == _TEMPLATE or key.startswith(_TEMPLATE + ".")


def _templates(checkpoint: Checkpoint) -> Mapping[str, object]:
    found: dict[str, object] = {}
    if checkpoint.chat_template is not None:
        found[_TEMPLATE] = checkpoint.chat_template
    for name, template in checkpoint.chat_templates.items():
        found[f"{_TEMPLATE}.{name}"] = template
    if checkpoint.chat_templates:
        found["tokenizer.chat_templates"] = list(checkpoint.chat_templates)
    return found
