"""Tokenizer: text to token ids and back, whatever file the vocabulary came from.

A ``TokenizerSource`` describes a tokenizer without building it, which is what a checkpoint holds;
``build()`` does the work. The merging itself is done by the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nybble.text.decoder import IncrementalDecoder
from nybble.text.vocabulary import Vocabulary

__all__ = [
    "FolderTokenizerSource",
    "GGUFTokenizerSource",
    "IncrementalDecoder",
    "Tokenizer",
    "TokenizerSource",
    "Vocabulary",
]


class TextEncoder(Protocol):
    """Text to ids without begin and end tokens."""

    def encode(self, text: str, *, parse_special: bool) -> list[int]: ...


class TokenizerSource(Protocol):
    """A tokenizer as a file describes it."""

    def build(self) -> Tokenizer:
        """Builds it; FormatError when the description is broken, UnsupportedError when unknown."""
        ...


@dataclass(frozen=True)
class GGUFTokenizerSource:
    """GGUF metadata: the keys ``tokenizer.ggml.*`` and ``general.name`` (other keys are ignored).

    Arrays may be any sequences, decoded lazily or not; numeric ones may be NumPy arrays.
    """

    metadata: Mapping[str, object]

    def build(self) -> Tokenizer:
        from nybble.text.gguf_tokenizer import build_gguf_tokenizer

        return build_gguf_tokenizer(self.metadata)


@dataclass(frozen=True)
class FolderTokenizerSource:
    """A folder with ``tokenizer.json`` and, if there, ``tokenizer_config.json``,
    ``special_tokens_map.json`` and ``generation_config.json``."""

    folder: Path

    def build(self) -> Tokenizer:
        from nybble.text.folder_tokenizer import build_folder_tokenizer

        return build_folder_tokenizer(self.folder)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens with a meaning; None where the model has none."""

    bos: int | None = None
    eos: frozenset[int] = frozenset()
    """Every token that ends a generation."""
    unk: int | None = None
    pad: int | None = None
    main_eos: int | None = None
    """The one that the file calls its end token; templates print it."""


class Tokenizer:
    """Encodes and decodes. Safe to use from several threads.

    ``prefix`` and ``suffix`` are the ids that ``add_special`` puts around a text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: TextEncoder,
        special: SpecialIds,
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        space_prefix: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.special = special
        self.prefix = tuple(prefix)
        self.suffix = tuple(suffix)
        self._encoder = encoder
        self._space_prefix = space_prefix
        self._ids: dict[str, int] | None = None

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        ``add_special`` adds the begin and end tokens that the model wants around a document; leave
        it off for the output of a chat template, which writes them itself. ``parse_special`` False
        takes names such as ``<|im_end|>`` in the text as plain characters: use it for text that
        somebody else wrote. Unpaired surrogates become U+FFFD.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = self._encoder.encode(text, parse_special=parse_special) if text else []
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD. IndexError for an unknown id."""
        decoder = self.decoder(skip_special=skip_special)
        pieces = [decoder.add(token_id) for token_id in ids]
        return "".join(pieces) + decoder.finish()

    def decoder(self, *, skip_special: bool = True) -> IncrementalDecoder:
        """A decoder that takes one token at a time."""
        return IncrementalDecoder(self.vocabulary, skip_special=skip_special, space_prefix=self._space_prefix)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (a special token's: its name)."""
        return self.vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it, such as ``Ġthe`` or ``▁the``."""
        return self.vocabulary.texts[self.vocabulary.check(token_id)]

    def token_id(self, text: str) -> int | None:
        """Id of the token that the vocabulary spells this way, or None."""
        if self._ids is None:
            self._ids = {name: i for i, name in enumerate(self.vocabulary.texts)}
        return self._ids.get(text)

    def is_special(self, token_id: int) -> bool:
        """Whether a token steers the model instead of being text."""
        return self.vocabulary.is_special(token_id)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's logits may be padded to more."""
        return len(self.vocabulary)

    @property
    def bos_id(self) -> int | None:
        return self.special.bos

    @property
    def eos_id(self) -> int | None:
        """The end token that the file names; ``eos_ids`` has all that end a generation."""
        return self.special.main_eos

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.special.eos

    @property
    def unk_id(self) -> int | None:
        return self.special.unk

    @property
    def pad_id(self) -> int | None:
        return self.special.pad

    @property
    def bos_token(self) -> str:
        """Text of the begin token for chat templates; empty when there is none."""
        return "" if self.bos_id is None else self.token_text(self.bos_id)

    @property
    def eos_token(self) -> str:
        """Text of the end token for chat templates; empty when there is none."""
        return "" if self.eos_id is None else self.token_text(self.eos_id)
