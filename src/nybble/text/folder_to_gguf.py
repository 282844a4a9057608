"""A folder's tokenizer as GGUF keys: tokens, types, scores, merges, switches, and the proof that they work.

Types and padding follow llama.cpp's converter (``convert_hf_to_gguf.py``), so that other programs find
what they expect.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError, UnsupportedError
from nybble.text.end_tokens import KNOWN_ENDS
from nybble.text.folder_tokenizer import read_folder_tokenizer
from nybble.text.gguf_tokenizer import build_gguf_tokenizer
from nybble.text.merges import merges_from_scores
from nybble.text.pretokenizer_names import PROBE, flat_steps, pre_tokenizer_name
from nybble.text.sentencepiece_model import read_pieces
from nybble.text.vocabulary import SPACE_MARK, TokenType, byte_of
from nybble.text.word_piece import marked_text

_KEY = "tokenizer.ggml."
_MAX_TOKENS = 1 << 24
_CONVERTED_SCORE = -1000.0
"""The score that llama.cpp's converter gives to added tokens, which it makes control tokens."""
_UNUSED, _BYTE = int(TokenType.UNUSED), int(TokenType.BYTE)
_STEERING = (int(TokenType.CONTROL), int(TokenType.UNKNOWN))
# Composed, because GGUF has no normalization form and tokenizer.json may have one.
_PLAIN_TEXTS = (
    unicodedata.normalize("NFC", PROBE),
    "",
    "a",
    " a",
    "a ",
    "a  b",
    " ",
    "\n",
    "Hello, world! 123 ünï 中文 👩‍💻",
)


def folder_to_gguf(folder: Path, vocab_size: int) -> tuple[dict[str, object], list[str]]:
    """The keys ``tokenizer.ggml.*``, and notes about what they cannot say. Errors as ``gguf_tokenizer``."""
    found = _Folder(folder, vocab_size)
    metadata = {_KEY + key: value for key, value in found.metadata().items()}
    found.drop_file()
    _check(metadata, found)
    return metadata, found.notes


class _Folder:
    """A tokenizer.json while it is turned into GGUF keys."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.path = folder / "tokenizer.json"
        self.built, self.description = read_folder_tokenizer(folder)
        self.model: dict[str, Any] = self.description["model"]
        self.notes: list[str] = []
        self.texts_to_check: tuple[str, ...] = _PLAIN_TEXTS
        self.added = {int(token["id"]): token for token in self.description.get("added_tokens") or ()}
        self.size = vocab_size
        self.texts, self.types = self._vocabulary()

    def drop_file(self) -> None:
        """Forgets tokenizer.json: as Python objects it takes 200 MB where there are 262,144 tokens."""
        self.description = self.model = {}

    def metadata(self) -> dict[str, object]:
        kind = self.model.get("type") or ("BPE" if "merges" in self.model else None)
        if kind == "BPE":
            byte_level = any(
                step.get("type") == "ByteLevel" for step in flat_steps(self.description.get("pre_tokenizer"))
            )
            found = self._byte_level() if byte_level else self._scored()
        elif kind == "Unigram":
            found = self._unigram()
        elif kind == "WordPiece":
            found = self._word_piece()
        else:
            raise UnsupportedError(f"{self.path}: GGUF has no tokenizer model for {kind!r}")
        self._note_white_space(found)
        return {
            **found,
            "tokens": self.texts,
            "token_type": self.types.astype(np.int32),
            **self._special(),
        }

    def _vocabulary(self) -> tuple[list[str], npt.NDArray[np.uint8]]:
        """Texts and types of all ``vocab_size`` tokens; ids without a token become padding."""
        if self.size > _MAX_TOKENS:
            raise FormatError(
                f"{self.path}: the model's vocabulary has {self.size} tokens; the limit is {_MAX_TOKENS}"
            )
        texts: list[str | None] = [None] * self.size
        types = np.full(self.size, TokenType.UNUSED, np.uint8)
        vocabulary = self.model.get("vocab")
        pairs: Iterable[tuple[str, int]] = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((entry[0], i) for i, entry in enumerate(vocabulary or ()))
        )
        normal = int(TokenType.NORMAL)
        for text, token_id in pairs:
            if token_id >= self.size:
                if token_id in self.added:
                    continue
                raise FormatError(
                    f"{self.path} has token {text!r} with id {token_id}, but the model's vocabulary ends at "
                    f"{self.size - 1}"
                )
            texts[token_id] = text
            types[token_id] = normal
        for token_id, token in self.added.items():
            # Ids behind the model's vocabulary have no embedding and can never be fed to it.
            if token_id < self.size:
                texts[token_id] = token["content"]
                types[token_id] = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        return [text if text is not None else f"[PAD{i}]" for i, text in enumerate(texts)], types

    def _special(self) -> dict[str, object]:
        """Ids of the tokens with a meaning, and whether begin and end tokens are added."""
        special = self.built.special
        bert = self.model.get("type") == "WordPiece"
        ids = {
            "bos": special.bos,
            "eos": special.main_eos,
            "unknown": special.unk if special.unk is not None else self._unknown(),
            "padding": special.pad,
        }
        # Readers know the usual end tokens by name; GGUF has room for one more.
        others = [i for i in sorted(special.eos - {special.main_eos}) if self.texts[i] not in KNOWN_ENDS]
        if others and not bert:
            ids["eot"] = others[0]
        if others[1:]:
            names = ", ".join(self.texts[i] for i in others[1:])
            self.notes.append(f"GGUF has no place for further end tokens: {names}")
        if bert:
            ids["cls"] = self.built.prefix[0] if self.built.prefix else None
            ids["seperator"] = self.built.suffix[0] if self.built.suffix else None
            ids["mask"] = next((i for i, token in self.added.items() if token["content"] == "[MASK]"), None)
        found: dict[str, object] = {
            f"{name}_token_id": token_id
            for name, token_id in ids.items()
            if token_id is not None and token_id < self.size
        }
        if bert:
            return found
        for name, given, token in (
            ("bos", self.built.prefix, special.bos),
            ("eos", self.built.suffix, special.main_eos),
        ):
            if given and list(given) != [token]:
                around = [self.built.token_text(i) for i in given]
                raise UnsupportedError(
                    f"{self.path} puts {around} around a text; GGUF can only say the {name} token"
                )
            found[f"add_{name}_token"] = bool(given)
        return found

    def _unknown(self) -> int | None:
        """The model's unknown token, where tokenizer_config.json names none."""
        if isinstance(self.model.get("unk_id"), int):
            return cast(int, self.model["unk_id"])
        name = self.model.get("unk_token")
        return self.built.token_id(name) if isinstance(name, str) else None

    def _byte_level(self) -> dict[str, object]:
        for step in flat_steps(self.description.get("normalizer")):
            if step.get("type") != "NFC":
                raise self._unknown_part("normalizer", step)
            self.notes.append(
                "the folder's tokenizer composes characters first (NFC), GGUF tokenizers do not: text with "
                "combining marks may get other ids"
            )
        for step in flat_steps(self.description.get("pre_tokenizer")):
            if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                raise self._unknown_part("pre-tokenizer (it adds a space before the text)", step)
        ignore_merges = bool(self.model.get("ignore_merges"))
        name, same = pre_tokenizer_name(self.description.get("pre_tokenizer"), ignore_merges=ignore_merges)
        if not same and not self._merges_make_every_token():
            raise UnsupportedError(
                f"{self.path}: ignore_merges is {ignore_merges}, but GGUF's pre-tokenizer {name!r} means "
                f"{not ignore_merges}, and some tokens cannot be made by merges"
            )
        return {"model": "gpt2", "pre": name, "merges": [f"{a} {b}" for a, b in self._merges()]}

    def _merges_make_every_token(self) -> bool:
        """Whether each token, as a text, is encoded as itself by merges alone."""
        import tokenizers

        model = {**self.model, "ignore_merges": False}
        description = {"version": "1.0", "added_tokens": list[object](), "model": model}
        runner = tokenizers.Tokenizer.from_str(json.dumps(description))
        words = [i for i in np.flatnonzero(self.types == TokenType.NORMAL).tolist()]
        encodings = runner.encode_batch([self.texts[i] for i in words], add_special_tokens=False)
        return all(encoding.ids == [i] for i, encoding in zip(words, encodings, strict=True))

    def _merges(self) -> list[tuple[str, str]]:
        merges = self.model.get("merges")
        if not isinstance(merges, list):
            raise FormatError(f"{self.path} has no merges")
        pairs = []
        for merge in merges:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            pairs.append((left, right))
        return pairs

    def _scored(self) -> dict[str, object]:
        """SentencePiece's BPE: merges become scores, if scores can say the same."""
        prefix = self._space_prefix()
        self._mark_types()
        scores = self._file_scores()
        merges = self._merges()
        if scores is None or not self._same_merges(scores, merges):
            scores = self._scores_from_merges(merges)
        if not self._same_merges(scores, merges):
            return self._marked_byte_pair(prefix, merges)
        return {
            "model": "llama",
            "pre": "default",
            "scores": scores,
            "add_space_prefix": prefix,
        }

    def _marked_byte_pair(self, prefix: bool, merges: list[tuple[str, str]]) -> dict[str, object]:
        """BPE over ``▁`` text whose merges follow no scores: GGUF's model gemma4."""
        if prefix or any("\n" in a + b for a, b in merges):
            raise UnsupportedError(
                f"{self.path}: the merges are not in the order of any scores, and GGUF's other model for "
                "them (gemma4) knows no space before the text and no merges with line breaks"
            )
        for i, text in enumerate(self.texts):
            if self.types[i] == TokenType.USER_DEFINED and text and not text.strip("\n"):
                self.types[i] = TokenType.NORMAL
        return {"model": "gemma4", "pre": "gemma4", "merges": [f"{a} {b}" for a, b in merges]}

    def _space_prefix(self) -> bool:
        """Whether a space goes before the text; UnsupportedError when more than spaces is changed."""
        import tokenizers

        model: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}
        parts = {part: self.description.get(part) for part in ("normalizer", "pre_tokenizer")}
        runner = tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model})
        )

        def spelled(text: str) -> tuple[str, list[str]]:
            if runner.normalizer is not None:
                text = runner.normalizer.normalize_str(text)
            pieces = [text]
            if runner.pre_tokenizer is not None:
                pieces = [piece for piece, _ in runner.pre_tokenizer.pre_tokenize_str(text)]
            return "".join(pieces), pieces

        prefix = spelled("a")[0] == SPACE_MARK + "a"
        # Also what NFC, NFKC, lowercasing and stripping would change.
        for text in (PROBE, "a  b ", "A\u0301ﬁ Ａ\u00a0ſ①", "\ta\n b"):
            wanted = (SPACE_MARK if prefix else "") + text.replace(" ", SPACE_MARK)
            if spelled(text)[0] != wanted:
                raise self._unknown_part("normalizer and pre-tokenizer", parts)
        if len(spelled("aa bb")[1]) > 1 and any(
            SPACE_MARK in text.lstrip(SPACE_MARK) and kind == TokenType.NORMAL
            for text, kind in zip(self.texts, self.types.tolist(), strict=True)
        ):
            raise self._unknown_part(
                "pre-tokenizer (it cuts at spaces, and tokens have spaces inside)", parts
            )
        schemes = [
            step.get("prepend_scheme", "always")
            for step in flat_steps(parts["pre_tokenizer"])
            if step.get("type") == "Metaspace"
        ]
        if prefix and schemes:
            self.texts_to_check = tuple(text for text in _PLAIN_TEXTS if not text.startswith(" "))
            self.notes.append(
                "the folder's tokenizer puts no space before a text that starts with one; GGUF tokenizers do"
            )
        if prefix and "first" in schemes:
            self.notes.append(
                "the folder's tokenizer puts a space before the whole text only; GGUF tokenizers also before "
                "the text after each special token"
            )
        return prefix

    def _mark_types(self) -> None:
        """Byte tokens and the unknown token of a SentencePiece vocabulary."""
        places = [i for i, text in enumerate(self.texts) if text.startswith("<0x")]
        for i in places:
            if self.types[i] == TokenType.NORMAL and byte_of(self.texts[i]) is not None:
                self.types[i] = TokenType.BYTE
        unknown = self._unknown()
        if unknown is not None and unknown < self.size:
            self.types[unknown] = TokenType.UNKNOWN

    def _file_scores(self) -> npt.NDArray[np.float32] | None:
        """Scores of tokenizer.model, if it has the same tokens; takes its types where it knows better."""
        path = self.path.parent / "tokenizer.model"
        if not path.is_file():
            return None
        pieces = read_pieces(path.read_bytes(), str(path))
        if len(pieces) > self.size or any(
            piece.text != text and i not in self.added
            for i, (piece, text) in enumerate(zip(pieces, self.texts, strict=False))
        ):
            return None
        scores = np.full(self.size, _CONVERTED_SCORE, np.float32)
        scores[: len(pieces)] = [piece.score for piece in pieces]
        for i, piece in enumerate(pieces):
            if piece.kind in (_UNUSED, _BYTE) and i not in self.added:
                self.types[i] = piece.kind
        for i, token in self.added.items():
            if i >= len(pieces):
                continue
            kind, special = pieces[i].kind, bool(token.get("special"))
            if pieces[i].text != self.texts[i]:
                scores[i] = _CONVERTED_SCORE
            elif kind == TokenType.UNKNOWN and pieces[i].score == _CONVERTED_SCORE:
                self.types[i] = TokenType.CONTROL
            elif (special and kind in _STEERING) or (not special and kind == TokenType.USER_DEFINED):
                self.types[i] = kind
        return scores

    def _scores_from_merges(self, merges: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """0 for the token of the first merge, -1 for the next one and so on, as SentencePiece trains
        them; then the single characters."""
        ids = {text: i for i, text in enumerate(self.texts)}
        scores = np.zeros(self.size, np.float32)
        order = dict.fromkeys(ids[a + b] for a, b in merges if a + b in ids)
        made = np.fromiter(order, np.int64, len(order))
        scores[made] = -np.arange(len(made), dtype=np.float32)
        rest = self.types == TokenType.NORMAL
        rest[made] = False
        scores[rest] = -np.arange(len(made), len(made) + int(rest.sum()), dtype=np.float32)
        scores[[i for i in self.added if i < self.size]] = _CONVERTED_SCORE
        scores[self.types == TokenType.UNUSED] = _CONVERTED_SCORE
        return scores

    def _same_merges(self, scores: npt.NDArray[np.float32], merges: list[tuple[str, str]]) -> bool:
        """Whether merging by score is merging in this order."""
        mergeable = np.isin(self.types, (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED))
        beside = [i for i in self.added if i < self.size and self.texts[i] not in self.model["vocab"]]
        mergeable[beside] = False
        if merges_from_scores(self.texts, scores, mergeable) == merges:
            return True
        # Merges with added tokens do not count: those are found by name before anything is merged.
        mergeable[[i for i in self.added if i < self.size]] = False
        expected = merges_from_scores(self.texts, scores, mergeable)
        names = {token["content"] for token in self.added.values()}
        merges = [pair for pair in merges if names.isdisjoint((*pair, pair[0] + pair[1]))]
        if len(expected) != len(merges) or set(expected) != set(merges):
            return False
        ids = {text: i for i, text in enumerate(self.texts)}
        order = scores[[ids[a + b] for a, b in merges]]
        return bool((order[1:] <= order[:-1]).all())

    def _unigram(self) -> dict[str, object]:
        charsmap = b""
        for step in flat_steps(self.description.get("normalizer")):
            kind = step.get("type")
            if kind == "Precompiled":
                charsmap = base64.b64decode(step["precompiled_charsmap"])
            elif kind not in ("Replace", "Strip", "Prepend"):
                raise self._unknown_part("normalizer", step)
        for step in flat_steps(self.description.get("pre_tokenizer")):
            if step.get("type") not in ("Metaspace", "WhitespaceSplit"):
                raise self._unknown_part("pre-tokenizer", step)
        vocabulary = self.model.get("vocab") or []
        scores = np.full(self.size, _CONVERTED_SCORE, np.float32)
        scores[: len(vocabulary)] = [entry[1] for entry in vocabulary][: self.size]
        self._mark_types()
        self._file_scores()
        probe = self.built.encode("a  b", add_special=False)
        merged = probe == self.built.encode("a b", add_special=False)
        prefix = self.built.token_text(self.built.encode("a", add_special=False)[0]).startswith(SPACE_MARK)
        found: dict[str, object] = {
            "model": "t5",
            "pre": "default",
            "scores": scores,
            "add_space_prefix": prefix,
            "remove_extra_whitespaces": merged,
        }
        if charsmap:
            found["precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
        return found

    def _word_piece(self) -> dict[str, object]:
        lowercase, accents = False, False
        for step in flat_steps(self.description.get("normalizer")):
            if step.get("type") != "BertNormalizer":
                raise self._unknown_part("normalizer", step)
            lowercase = bool(step.get("lowercase", True))
            given = step.get("strip_accents")
            accents = lowercase if given is None else bool(given)
        for step in flat_steps(self.description.get("pre_tokenizer")):
            if step.get("type") != "BertPreTokenizer":
                raise self._unknown_part("pre-tokenizer", step)
        if self.model.get("continuing_subword_prefix", "##") != "##":
            raise self._unknown_part(
                "model", {"continuing_subword_prefix": self.model["continuing_subword_prefix"]}
            )
        for i in np.flatnonzero(self.types == TokenType.NORMAL).tolist():
            self.texts[i] = marked_text(self.texts[i])
        return {
            "model": "bert",
            "pre": "default",
            "normalizer.lowercase": lowercase,
            "normalizer.strip_accents": accents,
        }

    def _note_white_space(self, found: Mapping[str, object]) -> None:
        """Tokens that eat the white space beside them: GGUF knows Phi-3's by their names alone."""
        eating = sorted(
            token["content"]
            for token in self.added.values()
            if token.get("rstrip") or (token.get("lstrip") and token["content"] not in ("<mask>", "[MASK]"))
        )
        phi3 = found["model"] == "llama" and {"<|user|>", "<|assistant|>", "<|end|>"} <= set(eating)
        if eating and not phi3:
            self.notes.append(
                f"white space beside {', '.join(eating[:5])} stays in GGUF; the folder's tokenizer drops it"
            )

    def _unknown_part(self, part: str, value: object) -> UnsupportedError:
        shown = json.dumps(value, ensure_ascii=False)
        return UnsupportedError(f"{self.path}: GGUF has no form for this {part}: {shown:.400}")


def _check(metadata: Mapping[str, object], folder: _Folder) -> None:
    """Encodes plain texts both ways. UnsupportedError at the first that gets other ids."""
    other = build_gguf_tokenizer(metadata)
    for text in folder.texts_to_check:
        wanted, found = folder.built.encode(text), other.encode(text)
        if wanted != found:
            first = next(
                (i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]),
                min(len(wanted), len(found)),
            )
            raise UnsupportedError(
                f"{folder.path}: as GGUF this tokenizer gives other ids for {text[:60]!r}, "
                f"from token {first} on: {found[first : first + 4]} instead of {wanted[first : first + 4]}"
            )
