"""What a GGUF file says about its tokenizer, with defaults filled in and special tokens sorted out.

``gguf_tokenizer`` builds a tokenizer from it, ``write_folder`` writes it as ``tokenizer.json``. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer; what holds where a key is missing
is llama.cpp's behaviour: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError, UnsupportedError
from nybble.text.end_tokens import (
    ALWAYS_TEXT,
    FILL_FILE_NAMES,
    FILL_PAD_NAMES,
    FILL_REPOSITORY_NAMES,
    end_tokens,
    first_of,
)
from nybble.text.pretokenizers import PreTokenizer, pre_tokenizer
from nybble.text.tokenizer import SpecialIds
from nybble.text.vocabulary import Spelling, TokenType, Vocabulary

_PREFIX = "tokenizer.ggml."
_MODELS = ("llama", "gpt2", "gemma4", "t5", "bert")
# begin, end, unknown, separator and padding ids where the file gives none.
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0},
}
# Phi-3's tokens eat the white space after them, except these (its tokenizer.json; GGUF cannot say so).
_PHI3_MARKS = ("<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>")
_PHI3_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


class TokenizerKeys:
    """Typed access to the keys ``tokenizer.ggml.*``."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def text(self, key: str, default: str = "") -> str:
        value = self._metadata.get(_PREFIX + key, default)
        if not isinstance(value, str):
            raise FormatError(f"{_PREFIX}{key} must be a string, not {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(_PREFIX + key)
        return default if value is None else bool(value)

    def token(self, key: str, size: int) -> int | None:
        """A token id, or None when the key is absent or points outside the vocabulary."""
        value = self._metadata.get(f"{_PREFIX}{key}_token_id")
        if value is None:
            return None
        token_id = int(cast(int, value))
        return token_id if 0 <= token_id < size else None

    def strings(self, key: str) -> Sequence[str] | None:
        """An array of strings; None when the key is absent."""
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise FormatError(f"{_PREFIX}{key} must be an array of strings")
        if not isinstance(next(iter(value), ""), str):
            raise FormatError(f"{_PREFIX}{key} must be an array of strings")
        return value

    def numbers(self, key: str, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any] | None:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        try:
            found = np.asarray(value if isinstance(value, np.ndarray) else list(cast(Any, value)), dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{_PREFIX}{key} must be an array of numbers: {error}") from None
        if found.ndim != 1 or len(found) < size:
            raise FormatError(f"{_PREFIX}{key} has {found.size} entries for {size} tokens")
        return found[:size]

    def raw_bytes(self, key: str) -> bytes:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return b""
        if isinstance(value, bytes):
            return value
        return np.asarray(list(cast(Any, value)), np.int64).astype(np.uint8).tobytes()

    def get(self, key: str) -> object:
        return self._metadata.get(key)


@dataclass
class GGUFDescription:
    """A tokenizer of a GGUF file. ``vocabulary.types`` are the types that count; ``file_types`` are
    those in the file, before end tokens were made control tokens."""

    keys: TokenizerKeys
    model: str
    """``llama`` (scored BPE), ``gpt2`` and ``gemma4`` (BPE), ``t5`` (unigram) or ``bert`` (WordPiece)."""
    row: PreTokenizer
    vocabulary: Vocabulary
    file_types: npt.NDArray[np.uint8]
    ids: dict[str, int]
    special: SpecialIds
    space_prefix: bool
    """The flag as given or implied; it acts in ``llama`` and ``t5`` only."""
    prefix: list[int]
    suffix: list[int]
    user: list[int]
    """Tokens that are found by name in any text."""
    steering: list[int]
    """Tokens that are found by name in trusted text only."""
    strip_left: frozenset[int]
    strip_right: frozenset[int]

    def merges(self) -> Sequence[str]:
        """The merges of ``gpt2`` and ``gemma4``, as "left right". FormatError when there are none."""
        merges = self.keys.strings("merges")
        if merges is None:
            raise FormatError("the file has no merges: tokenizer.ggml.merges is missing")
        return merges

    def scores(self) -> npt.NDArray[np.float32]:
        """The scores of ``llama`` and ``t5``, shape (tokens,). FormatError: missing, short or NaN."""
        scores = self.keys.numbers("scores", np.float32, len(self.vocabulary))
        if scores is None:
            raise FormatError("the file has no scores: tokenizer.ggml.scores is missing")
        if np.isnan(scores).any():
            raise FormatError("tokenizer.ggml.scores holds NaN")
        return scores

    @property
    def merge_spaces(self) -> bool:
        """``t5``: whether runs of spaces become one and those at the ends go."""
        return self.keys.flag("remove_extra_whitespaces", False)

    @property
    def lowercase(self) -> bool:
        """``bert``: whether text is lowercased."""
        return self.keys.flag("normalizer.lowercase", True)

    @property
    def strip_accents(self) -> bool:
        """``bert``: whether accents are taken away."""
        return self.keys.flag("normalizer.strip_accents", self.lowercase)


def describe(metadata: Mapping[str, object]) -> GGUFDescription:
    """Reads the keys ``tokenizer.ggml.*``, except for scores and merges.

    FormatError: keys missing, of a wrong type, or contradicting each other. UnsupportedError: a
    tokenizer model or pre-tokenizer that nybble does not know.
    """
    data = TokenizerKeys(metadata)
    model = data.text("model")
    if model not in _MODELS:
        if not model:
            raise FormatError("the file has no tokenizer: tokenizer.ggml.model is missing")
        raise UnsupportedError(f"unknown tokenizer model {model!r}; known: {', '.join(_MODELS)}")
    texts = list(data.strings("tokens") or ())
    if not texts:
        raise FormatError("the file has no vocabulary: tokenizer.ggml.tokens is missing or empty")
    if "" in texts:
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    ids = {text: i for i, text in enumerate(texts)}
    if len(ids) != len(texts):
        twice = next(text for i, text in enumerate(texts) if ids[text] != i)
        raise FormatError(f"token {twice!r} is twice in the vocabulary (tokenizer.ggml.tokens)")
    types = _types(data, len(texts))
    file_types = types.copy()

    row = _pre_tokenizer(data, model)
    spelling: Spelling = "byte_level" if model == "gpt2" and row.byte_level else "sentencepiece"
    special = _special_ids(data, model, ids, types)
    vocabulary = Vocabulary(texts, types, spelling)
    if data.flag("treat_whitespace_as_suffix", False):
        raise UnsupportedError("tokenizers that put the space behind the word are not supported")
    prefix, suffix = _around(data, model, row, special, len(texts))
    user, steering, left, right = _found_by_name(data, model, vocabulary, file_types, ids)
    return GGUFDescription(
        keys=data,
        model=model,
        row=row,
        vocabulary=vocabulary,
        file_types=file_types,
        ids=ids,
        special=special,
        space_prefix=data.flag("add_space_prefix", model == "llama"),
        prefix=prefix,
        suffix=suffix,
        user=user,
        steering=steering,
        strip_left=left,
        strip_right=right,
    )


def _types(data: TokenizerKeys, size: int) -> npt.NDArray[np.uint8]:
    types = data.numbers("token_type", np.int64, size)
    if types is None:
        return np.full(size, TokenType.NORMAL, np.uint8)
    known = (types >= 0) & (types <= max(TokenType))
    return np.where(known, types, TokenType.UNDEFINED).astype(np.uint8)


def _pre_tokenizer(data: TokenizerKeys, model: str) -> PreTokenizer:
    if model == "gemma4":
        return pre_tokenizer("gemma4")
    if model != "gpt2":
        return PreTokenizer(())
    return pre_tokenizer(data.text("pre") or "default")


def _special_ids(
    data: TokenizerKeys, model: str, ids: dict[str, int], types: npt.NDArray[np.uint8]
) -> SpecialIds:
    """Special ids by key, default or name. Marks end tokens as control tokens in ``types``."""
    size = len(types)

    def token(name: str) -> int | None:
        found = data.token(name, size)
        if found is None:
            found = _DEFAULT_IDS.get(model, {}).get(name)
        return found if found is not None and found < size else None

    bos = token("cls") if model == "bert" and data.token("bos", size) is None else None
    bos = token("bos") if bos is None else bos
    eos = token("eos")
    fills = [
        token(key) if token(key) is not None else first_of(ids, names)
        for key, names in (
            ("fim_pad", FILL_PAD_NAMES),
            ("fim_rep", FILL_REPOSITORY_NAMES),
            ("fim_sep", FILL_FILE_NAMES),
        )
    ]
    # In vocabularies of web text "</s>" may be an ordinary word (HTML's end of strike-through).
    marks = ids
    if "</s>" in ids and types[ids["</s>"]] == TokenType.NORMAL:
        marks = {name: i for name, i in ids.items() if name != "</s>"}
    ends = end_tokens(marks, [eos, token("eot"), token("eom"), *fills])
    types[[i for i in ends if types[i] != TokenType.UNKNOWN]] = TokenType.CONTROL
    types[[ids[name] for name in ALWAYS_TEXT if name in ids]] = TokenType.USER_DEFINED
    return SpecialIds(bos, ends, token("unknown"), token("padding"), eos)


def _around(
    data: TokenizerKeys, model: str, row: PreTokenizer, special: SpecialIds, size: int
) -> tuple[list[int], list[int]]:
    """The ids that go before and after a text."""
    separator = data.token("seperator", size)
    if separator is None:
        separator = _DEFAULT_IDS.get(model, {}).get("seperator")
    if model == "bert":
        return [i for i in (special.bos,) if i is not None], [i for i in (separator,) if i is not None]
    add_bos = data.flag("add_bos_token", model == "llama" or row.add_bos)
    add_eos = data.flag("add_eos_token", model == "t5")
    for wanted, found, name in ((add_bos, special.bos, "bos"), (add_eos, special.main_eos, "eos")):
        if wanted and found is None:
            raise FormatError(
                f"the tokenizer wants a {name} token, but tokenizer.ggml.{name}_token_id is missing"
            )
    prefix = [cast(int, special.bos)] if add_bos else []
    return prefix, [cast(int, special.main_eos)] if add_eos else []


def _found_by_name(
    data: TokenizerKeys,
    model: str,
    vocabulary: Vocabulary,
    file_types: npt.NDArray[np.uint8],
    ids: dict[str, int],
) -> tuple[list[int], list[int], frozenset[int], frozenset[int]]:
    """(tokens found in any text, in trusted text only, eating white space before, after them)."""
    types = vocabulary.types
    user = vocabulary.of_type(TokenType.USER_DEFINED)
    steering = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    # Control tokens that are kept in the answer's text: untrusted text must not spell them all the same.
    kept = {i for i in user if file_types[i] in (TokenType.CONTROL, TokenType.UNKNOWN)}
    user = [i for i in user if i not in kept]
    steering += sorted(kept)
    if model == "gemma4":
        # Runs of newlines are tokens that no merge makes.
        user += [i for text, i in ids.items() if not text.strip("\n") and types[i] == TokenType.NORMAL]
    right: frozenset[int] = frozenset()
    name = str(data.get("general.name") or "").lower()
    if model == "llama" and ("phi-3" in name or "phi3" in name or all(mark in ids for mark in _PHI3_MARKS)):
        keep = {ids[text] for text in _PHI3_KEEP_SPACE if text in ids}
        right = frozenset({*user, *steering} - keep)
    pre = data.text("pre")
    left = frozenset(
        ids[mask]
        for mask, names in (
            ("<mask>", ("jina-v2-de", "jina-v2-es", "jina-v2-code")),
            ("[MASK]", ("modern-bert",)),
        )
        if pre in names and mask in ids
    )
    return user, steering, left, right
