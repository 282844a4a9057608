"""Vocabulary: the texts and types of a model's tokens, and the bytes that each one stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

Spelling = Literal["byte_level", "sentencepiece"]
"""How a token's text spells bytes: GPT-2's byte alphabet, or ``▁`` for a space and ``<0xE4>``."""

SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenType(IntEnum):
    """GGUF's ``tokenizer.ggml.token_type`` (the enum of SentencePiece's model.proto)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, as a map from character to byte.

    Printable Latin-1 stands for itself; the other 68 bytes take U+0100 and up, in order.
    Source: ``bytes_to_unicode`` of https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(hidden)})
    return alphabet


def byte_of(text: str) -> int | None:
    """The byte that a byte-fallback token such as ``<0x0A>`` stands for, or None."""
    match = _BYTE_TOKEN.fullmatch(text)
    return int(match.group(1), 16) if match else None


_STEERING = (int(TokenType.CONTROL), int(TokenType.UNKNOWN))


class PackedStrings(Sequence[str]):
    """Strings in one piece of memory, decoded one at a time: a tenth of what a list of them takes."""

    def __init__(self, strings: Sequence[str]) -> None:
        # JSON may spell half a surrogate pair, which UTF-8 proper cannot hold.
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        self._data = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends.item(index)
        first = index in (0, -len(self._ends))
        return self._data[0 if first else self._ends.item(index - 1) : end].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self._data[start:end].decode("utf-8", "surrogatepass")
            start = end


class Vocabulary:
    """Token texts as the file spells them, one ``TokenType`` each (uint8, shape (size,))."""

    def __init__(self, texts: Sequence[str], types: npt.NDArray[np.uint8], spelling: Spelling) -> None:
        self.texts: Sequence[str] = texts
        self.types = types
        self.spelling = spelling
        self._bytes: dict[int, bytes] = {}

    def pack(self) -> None:
        """Keep the texts in less memory; looking one up takes longer afterwards."""
        self.texts = PackedStrings(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def check(self, token_id: int) -> int:
        """``token_id`` itself; IndexError when it is not in the vocabulary (or negative)."""
        if not 0 <= token_id < len(self.texts):
            raise IndexError(f"token id {token_id} is not in the vocabulary of {len(self.texts)} tokens")
        return token_id

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model and is no text: control and unknown tokens."""
        return self.types.item(self.check(token_id)) in _STEERING

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of all tokens of these types, ascending."""
        found: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token's text; a special token's are its name's."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(self.check(token_id))
        return known

    def _spell(self, token_id: int) -> bytes:
        text, kind = self.texts[token_id], self.types.item(token_id)
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            return text.encode("utf-8", "replace")
        if kind == TokenType.BYTE:
            byte = byte_of(text)
            return text.encode("utf-8", "replace") if byte is None else bytes([byte])
        if self.spelling == "sentencepiece":
            return text.replace(SPACE_MARK, " ").encode("utf-8", "replace")
        alphabet = byte_alphabet()
        if all(character in alphabet for character in text):
            return bytes(alphabet[character] for character in text)
        return text.encode("utf-8", "replace")
