"""Tokenizers from a Hugging Face folder: ``tokenizer.json`` as it is, run by `tokenizers`.

Around it stand ``tokenizer_config.json`` (names of special tokens, whether a begin token is added),
``special_tokens_map.json`` and ``generation_config.json`` (end tokens).
Format: https://huggingface.co/docs/tokenizers/api/tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.text.end_tokens import ALWAYS_TEXT, end_tokens
from nybble.text.tokenizer import SpecialIds, Tokenizer
from nybble.text.vocabulary import Spelling, TokenType, Vocabulary, byte_of
from nybble.text.word_piece import marked_text

if TYPE_CHECKING:
    import tokenizers

_MAX_JSON_BYTES = 256 << 20


class _HuggingFaceEncoder:
    """Two copies of one tokenizer, because the switch for special tokens is not safe to flip
    while another thread encodes. The second is made when untrusted text first comes."""

    def __init__(self, parsing: tokenizers.Tokenizer, ends: list[str]) -> None:
        self._parsing = parsing
        self._ends = ends
        self._plain: tokenizers.Tokenizer | None = None

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        runner = self._parsing if parse_special else self._untrusted()
        return runner.encode(text, add_special_tokens=False).ids

    def _untrusted(self) -> tokenizers.Tokenizer:
        if self._plain is None:
            import tokenizers

            plain = tokenizers.Tokenizer.from_str(self._parsing.to_str())
            # End tokens that the file does not call special (Phi-3's </s>): text must not spell them either.
            plain.add_special_tokens(self._ends)
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain


def build_folder_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer from a folder; errors as ``read_folder_tokenizer``."""
    return read_folder_tokenizer(folder)[0]


def read_folder_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer from a folder, and its tokenizer.json as data.

    NotFoundError: there is no tokenizer.json. FormatError: it is broken. UnsupportedError: its
    decoder is of a kind whose bytes nybble cannot tell.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{folder} has no tokenizer.json; nybble reads tokenizers from it or from GGUF")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise FormatError(f"{path} has {path.stat().st_size} bytes; the limit is {_MAX_JSON_BYTES}")
    try:
        text = path.read_text("utf-8")
        # In this order: what the library needs while it reads is as large as what Python makes of it.
        runner = tokenizers.Tokenizer.from_str(text)
        description = json.loads(text)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise FormatError(f"{path} is not a tokenizer: {error}") from error
    runner.no_padding()
    runner.no_truncation()
    decoder_kinds = set(_kinds(description.get("decoder")))
    word_piece = description["model"].get("type") == "WordPiece"
    spelling: Spelling = "sentencepiece" if word_piece else _spelling(decoder_kinds, path)
    vocabulary = _vocabulary(runner, spelling, word_piece=word_piece)
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    special = _special_ids(runner, config, _json(folder / "generation_config.json"))
    for token_id in special.eos:
        vocabulary.types[token_id] = TokenType.CONTROL
    ends = [vocabulary.texts[token_id] for token_id in sorted(special.eos)]
    for name in ALWAYS_TEXT:
        token_id_or_none = runner.token_to_id(name)
        if token_id_or_none is not None:
            vocabulary.types[token_id_or_none] = TokenType.USER_DEFINED
    prefix, suffix = _around(runner)
    for key, ids, token in (
        ("add_bos_token", prefix, special.bos),
        ("add_eos_token", suffix, special.main_eos),
    ):
        if isinstance(config.get(key), bool):
            ids[:] = [token] if config[key] and token is not None else []
    built = Tokenizer(
        vocabulary,
        _HuggingFaceEncoder(runner, ends),
        special,
        prefix=prefix,
        suffix=suffix,
        space_prefix=word_piece or "Strip" in decoder_kinds or _metaspace_prefix(description),
    )
    return built, description


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _kinds(part: object) -> Iterator[str]:
    """Type names of a component and of everything inside it."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:
            yield from _kinds(value)


def _spelling(decoder_kinds: set[str], path: Path) -> Spelling:
    if "ByteLevel" in decoder_kinds:
        return "byte_level"
    if decoder_kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return "sentencepiece"
    found = ", ".join(sorted(decoder_kinds)) or "none"
    raise UnsupportedError(f"{path} has decoder {found}; nybble knows ByteLevel, ByteFallback and Metaspace")


def _metaspace_prefix(description: dict[str, Any]) -> bool:
    decoder = description.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "Metaspace":
        return False
    fallback = "always" if decoder.get("add_prefix_space", True) else "never"
    return bool(decoder.get("prepend_scheme", fallback) != "never")


def _vocabulary(runner: tokenizers.Tokenizer, spelling: Spelling, *, word_piece: bool) -> Vocabulary:
    ids = runner.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if size > 16 * len(ids) + 1024:
        raise FormatError(f"tokenizer.json numbers {len(ids)} tokens up to {size - 1}")
    texts = [""] * size
    for text, token_id in ids.items():
        texts[token_id] = text
    types = np.full(size, TokenType.NORMAL, np.uint8)
    if spelling == "sentencepiece":
        types[[i for text, i in ids.items() if byte_of(text) is not None]] = TokenType.BYTE
    for token_id, added in runner.get_added_tokens_decoder().items():
        types[token_id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if word_piece:
        # Mark the begin of a word, as the other vocabularies do, instead of its rest.
        words = np.flatnonzero(types == TokenType.NORMAL).tolist()
        for token_id in words:
            texts[token_id] = marked_text(texts[token_id])
    return Vocabulary(texts, types, spelling)


def _special_ids(
    runner: tokenizers.Tokenizer, config: dict[str, Any], generation: dict[str, Any]
) -> SpecialIds:
    size = runner.get_vocab_size(with_added_tokens=True)

    def named(key: str) -> int | None:
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return runner.token_to_id(value) if isinstance(value, str) else None

    eos = named("eos_token")
    listed = generation.get("eos_token_id")
    given = [
        i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int) and 0 <= i < size
    ]
    if eos is None and given:
        eos = given[0]
    added = {token.content: i for i, token in runner.get_added_tokens_decoder().items() if token.special}
    bos = named("bos_token")
    ends = end_tokens(added, [eos, *given])
    return SpecialIds(bos, ends, named("unk_token"), named("pad_token"), eos)


def _around(runner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, found by trying."""
    plain = runner.encode("a", add_special_tokens=False).ids
    full = runner.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
