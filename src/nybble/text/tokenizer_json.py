"""tokenizer.json from what a GGUF file says, as plain data for ``json``.

The file does what ``gguf_models`` does in memory: the same model, and normalizer, pre-tokenizer, added
tokens, decoder and post-processor that cut, spell and join text the same way.
Format: https://huggingface.co/docs/tokenizers/api/tokenizer and the serde tags in
https://github.com/huggingface/tokenizers.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from nybble.errors import FormatError
from nybble.text.gguf_description import GGUFDescription
from nybble.text.merges import merges_from_scores
from nybble.text.pretokenizers import PreTokenizer
from nybble.text.vocabulary import SPACE_MARK, TokenType
from nybble.text.word_piece import plain_text

Json = dict[str, Any]

_SPACES_TO_MARKS: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_MARKS_TO_SPACES: Json = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
_BYTE_LEVEL: Json = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def tokenizer_json(found: GGUFDescription) -> Json:
    """The contents of tokenizer.json. FormatError: scores or merges are missing or broken."""
    added = _added_tokens(found)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(found),
        "pre_tokenizer": _pre_tokenizer(found),
        "post_processor": _post_processor(found),
        "decoder": _decoder(found),
        "model": _model(found, {token["id"] for token in added}),
    }


def token_count(found: GGUFDescription) -> int:
    """How many tokens go into the file: all but those that only pad the vocabulary."""
    texts, types = found.vocabulary.texts, found.file_types
    count = len(texts)
    while count > 1 and types[count - 1] == TokenType.UNUSED and texts[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return count


def _added_tokens(found: GGUFDescription) -> list[Json]:
    """Tokens found by name, with the type that the file gives them: special means that untrusted text
    cannot spell them and that decoding may drop them."""
    steering = set(found.steering)
    text_types = (TokenType.USER_DEFINED, TokenType.NORMAL)
    count = token_count(found)
    tokens = []
    for token_id in sorted({*found.user, *steering}):
        if token_id >= count:
            continue
        kind = found.file_types.item(token_id)
        # An end token by its name alone is special; one that the file calls user-defined stays so.
        special = kind not in text_types or (kind == TokenType.NORMAL and token_id in steering)
        tokens.append(
            {
                "id": token_id,
                "content": found.vocabulary.texts[token_id],
                "single_word": False,
                "lstrip": token_id in found.strip_left,
                "rstrip": token_id in found.strip_right,
                "normalized": False,
                "special": special,
            }
        )
    return tokens


def _sequence(kind: str, steps: list[Json]) -> Json | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", kind: steps}


def _normalizer(found: GGUFDescription) -> Json | None:
    steps: list[Json] = []
    if found.model == "bert":
        return {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": found.strip_accents,
            "lowercase": found.lowercase,
        }
    if found.model == "llama":
        if found.space_prefix:
            steps.append({"type": "Prepend", "prepend": SPACE_MARK})
        steps.append(_SPACES_TO_MARKS)
    elif found.model == "t5":
        charsmap = found.keys.raw_bytes("precompiled_charsmap")
        if charsmap:
            encoded = base64.b64encode(charsmap).decode()
            steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
        if found.merge_spaces:
            steps.append({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})
            steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        if found.merge_spaces or found.space_prefix:
            steps.append({"type": "Prepend", "prepend": " "})
        steps.append(_SPACES_TO_MARKS)
    elif found.row.space_mark:
        steps.append(_SPACES_TO_MARKS)
    return _sequence("normalizers", steps)


def _pre_tokenizer(found: GGUFDescription) -> Json | None:
    if found.model == "bert":
        return {"type": "BertPreTokenizer"}
    if found.model not in ("gpt2", "gemma4"):
        return None
    return _sequence("pretokenizers", split_steps(found.row))


def split_steps(row: PreTokenizer) -> list[Json]:
    """One row of the table of pre-tokenizers as steps of a Sequence."""
    behavior = "Removed" if row.drop_matches else "Isolated"
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
        for pattern in row.patterns
    ]
    return [*steps, _BYTE_LEVEL] if row.byte_level else steps


def _decoder(found: GGUFDescription) -> Json:
    if found.model == "bert":
        return {"type": "WordPiece", "prefix": "##", "cleanup": False}
    if found.vocabulary.spelling == "byte_level":
        return _BYTE_LEVEL
    steps = [_MARKS_TO_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if (found.model in ("llama", "t5") and found.space_prefix) or (
        found.model == "t5" and found.merge_spaces
    ):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(found: GGUFDescription) -> Json | None:
    """Puts the begin and end tokens around a text (around both of a pair)."""
    texts = found.vocabulary.texts
    around = sorted({*found.prefix, *found.suffix})
    if not around:
        return None

    def one(sequence: str, type_id: int) -> list[Json]:
        def special(ids: list[int]) -> list[Json]:
            return [{"SpecialToken": {"id": texts[i], "type_id": type_id}} for i in ids]

        # BERT puts its begin token before the first text only.
        begin = found.prefix if sequence == "A" or found.model != "bert" else []
        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*special(begin), text, *special(found.suffix)]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            texts[i]: {"id": texts[i], "ids": [i], "tokens": [texts[i]]} for i in sorted(around)
        },
    }


def _model(found: GGUFDescription, added: set[int]) -> Json:
    texts = found.vocabulary.texts
    count = token_count(found)
    if found.model == "t5":
        return _unigram(found, count)
    # Added tokens at the end of the vocabulary stand beside it: no piece of text can be looked up as one.
    size = count
    while size - 1 in added:
        size -= 1
    unknown = None if found.special.unk is None else texts[found.special.unk]
    if found.model == "bert":
        return {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": _word_piece_vocabulary(found, size),
        }
    merges: list[tuple[str, str]]
    if found.model == "llama":
        mergeable = np.isin(
            found.vocabulary.types, (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
        )
        # Tokens outside the model's vocabulary are found by name before any merge.
        mergeable[size:] = False
        merges = merges_from_scores(texts, found.scores(), mergeable)
    else:
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in found.merges())]
        known = {text for i, text in enumerate(texts[:size])}
        if not all(a in known and b in known and a + b in known for a, b in merges):
            # llama.cpp skips merges that it cannot use; `tokenizers` refuses the file.
            merges = [(a, b) for a, b in merges if a in known and b in known and a + b in known]
    byte_fallback = found.model == "llama" or not found.row.byte_level
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown if byte_fallback else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": found.model == "llama",
        "byte_fallback": byte_fallback,
        "ignore_merges": found.model != "llama" and found.row.ignore_merges,
        "vocab": {text: i for i, text in enumerate(texts[:size])},
        "merges": merges,
    }


def _unigram(found: GGUFDescription, count: int) -> Json:
    scores = found.scores()
    if found.special.unk is None:
        raise FormatError("a unigram vocabulary needs tokenizer.ggml.unknown_token_id")
    return {
        "type": "Unigram",
        "unk_id": found.special.unk,
        "vocab": list(
            zip(found.vocabulary.texts[:count], scores[:count].astype(float).tolist(), strict=True)
        ),
        "byte_fallback": bool((found.vocabulary.types == TokenType.BYTE).any()),
    }


def _word_piece_vocabulary(found: GGUFDescription, size: int) -> dict[str, int]:
    steering = set(found.steering)
    names: dict[str, int] = {}
    for i, text in enumerate(found.vocabulary.texts[:size]):
        name = text if i in steering else plain_text(text)
        if name in names:
            raise FormatError(
                f"tokens {names[name]} and {i} of the vocabulary are both {name!r} in WordPiece"
            )
        names[name] = i
    return names
