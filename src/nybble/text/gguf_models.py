"""The four tokenizer models of GGUF as `tokenizers` pipelines, and what feeds them fragments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError
from nybble.text.merges import merges_from_scores
from nybble.text.pretokenizers import PreTokenizer
from nybble.text.special import SpecialTokenSplitter
from nybble.text.vocabulary import SPACE_MARK, TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers

    from nybble.text.tokenizer import SpecialIds


class FragmentEncoder:
    """Cuts a text at its special tokens and encodes what is between them.

    ``space_prefix`` puts a space before every plain fragment, ``space_mark`` writes spaces as
    ``▁``: SentencePiece's habits.
    """

    def __init__(
        self,
        runner: tokenizers.Tokenizer,
        always: SpecialTokenSplitter,
        parsed: SpecialTokenSplitter,
        *,
        space_mark: bool,
        space_prefix: bool,
    ) -> None:
        self._runner, self._always, self._parsed = runner, always, parsed
        self._space_mark, self._space_prefix = space_mark, space_prefix

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for piece in (self._parsed if parse_special else self._always).split(text):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            plain = " " + piece if self._space_prefix else piece
            if self._space_mark:
                plain = plain.replace(" ", SPACE_MARK)
            ids += self._runner.encode(plain, add_special_tokens=False).ids
        return ids


def byte_pair(
    vocabulary: Vocabulary, ids: dict[str, int], merges: Sequence[str], row: PreTokenizer, special: SpecialIds
) -> tokenizers.Tokenizer:
    """BPE with given merges ("left right"), over bytes or over characters with byte fallback."""
    import tokenizers
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.models import BPE

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    names = ids
    if row.ignore_merges:
        # A whole piece may be looked up as a token: special tokens must not be found that way.
        made = {left + right for left, right in pairs}
        names = _hide_steering_tokens(vocabulary, ids, keep=made)

    def build(pairs: list[tuple[str, str]]) -> BPE:
        return BPE(
            names,
            pairs,
            ignore_merges=row.ignore_merges,
            byte_fallback=not row.byte_level,
            unk_token=None if special.unk is None or row.byte_level else vocabulary.texts[special.unk],
        )

    try:
        model = build(pairs)
    except Exception:  # `tokenizers` raises plain Exception; llama.cpp skips merges it cannot use
        usable = [(a, b) for a, b in pairs if a in names and b in names and a + b in names]
        model = _checked(lambda: build(usable))
    runner = tokenizers.Tokenizer(model)
    behavior = "removed" if row.drop_matches else "isolated"
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior) for pattern in row.patterns]
    if row.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    runner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return runner


def scored_byte_pair(
    vocabulary: Vocabulary, ids: dict[str, int], scores: npt.NDArray[np.float32], special: SpecialIds
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: merges recovered from the scores, characters fall back to bytes.

    Control, unknown and byte tokens are never the result of a merge, so no text can spell them.
    """
    import tokenizers
    from tokenizers.models import BPE

    mergeable = np.isin(vocabulary.types, (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED))
    merges = merges_from_scores(vocabulary.texts, scores, mergeable)
    unknown = None if special.unk is None else vocabulary.texts[special.unk]
    model = _checked(lambda: BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    return tokenizers.Tokenizer(model)


def unigram(
    vocabulary: Vocabulary,
    scores: npt.NDArray[np.float32],
    special: SpecialIds,
    *,
    charsmap: bytes,
    merge_spaces: bool,
    space_prefix: bool,
) -> tokenizers.Tokenizer:
    """SentencePiece unigram: the likeliest segmentation, after SentencePiece's normalization."""
    import tokenizers
    from tokenizers import Regex, normalizers
    from tokenizers.models import Unigram

    hidden = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
    byte_fallback = bool((vocabulary.types == TokenType.BYTE).any())
    pieces = [
        # A name with a space can never be found in normalized text; byte tokens are found by name.
        (f" {i}" if kind in hidden and kind != TokenType.BYTE else text, float(score))
        for i, (text, score, kind) in enumerate(zip(vocabulary.texts, scores, vocabulary.types, strict=True))
    ]
    model = _checked(lambda: Unigram(pieces, unk_id=special.unk, byte_fallback=byte_fallback))
    runner = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if charsmap:
        steps.append(_checked(lambda: normalizers.Precompiled(charsmap)))
    if merge_spaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    if merge_spaces or space_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    runner.normalizer = normalizers.Sequence(steps)
    return runner


def word_piece(
    vocabulary: Vocabulary, special: SpecialIds, *, lowercase: bool, strip_accents: bool
) -> tokenizers.Tokenizer:
    """BERT's WordPiece. GGUF marks the begin of a word (``▁word``), `tokenizers` the rest (``##``)."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    if special.unk is None:
        raise FormatError("a WordPiece vocabulary needs tokenizer.ggml.unknown_token_id")
    names: dict[str, int] = {}
    steering = (TokenType.CONTROL, TokenType.UNKNOWN)
    for i, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True)):
        if kind in steering:
            names[f" {i}"] = i
        else:
            names[text[1:] if text.startswith(SPACE_MARK) else "##" + text] = i
    unknown = next((name for name, i in names.items() if i == special.unk), None)
    model = _checked(lambda: WordPiece(names, unk_token=unknown, max_input_chars_per_word=100))
    runner = tokenizers.Tokenizer(model)
    runner.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
    )
    runner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return runner


def _hide_steering_tokens(vocabulary: Vocabulary, ids: dict[str, int], keep: set[str]) -> dict[str, int]:
    """The vocabulary with control tokens renamed so that no piece of text equals one."""
    hidden = set(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
    return {
        f" {i}" if i in hidden and len(text) > 1 and text not in keep else text: i for text, i in ids.items()
    }


def _checked(build: Callable[[], Any]) -> Any:
    """Runs a constructor of `tokenizers`, which raises plain Exception for a broken vocabulary."""
    try:
        return build()
    except Exception as error:
        raise FormatError(f"the tokenizer in the file is inconsistent: {error}") from error
