"""tokenizer.model: SentencePiece's file, read and written without its library.

Only what tokenizers need: pieces with score and type, and the switches of the normalizer. It is a
Protocol Buffers message: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto,
encoding: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nybble.errors import FormatError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_NAMES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _NORMALIZER_NAME = 2, 3, 4, 1
_MODEL_TYPES = {"unigram": 1, "bpe": 2}


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score and its type (``TokenType`` has the same numbers)."""

    text: str
    score: float
    kind: int


def read_pieces(data: bytes, where: str) -> list[Piece]:
    """The vocabulary of a tokenizer.model. FormatError when it is not one."""
    try:
        return [_read_piece(value) for field, value in _fields(data) if field == _PIECES]
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise FormatError(f"{where} is not a SentencePiece model: {error}") from None


def _read_piece(data: bytes | int) -> Piece:
    text, score, kind = "", 0.0, 1
    for field, value in _fields(_as_bytes(data)):
        if field == _PIECE:
            text = _as_bytes(value).decode("utf-8")
        elif field == _SCORE:
            score = struct.unpack("<f", _as_bytes(value))[0]
        elif field == _TYPE and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _as_bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) of a message; numbers of fixed size stay bytes."""
    position, size = 0, len(data)
    while position < size:
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            length, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {kind} at byte {position}")
        if length > size - position:
            raise ValueError(f"a field at byte {position} ends behind the file")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {position} is too long")


def write_model(
    pieces: Sequence[Piece],
    kind: Literal["bpe", "unigram"],
    ids: dict[str, int | None],
    *,
    byte_fallback: bool,
    charsmap: bytes,
    space_prefix: bool,
    merge_spaces: bool,
) -> bytes:
    """A tokenizer.model. ``ids`` has ``unk``, ``bos``, ``eos`` and ``pad``."""
    parts = []
    for piece in pieces:
        content = _bytes_field(_PIECE, piece.text.encode()) + _float_field(_SCORE, piece.score)
        if piece.kind != 1:
            content += _number_field(_TYPE, piece.kind)
        parts.append(_bytes_field(_PIECES, content))
    trainer = _number_field(_MODEL_TYPE, _MODEL_TYPES[kind]) + _number_field(_VOCAB_SIZE, len(pieces))
    trainer += _number_field(_BYTE_FALLBACK, int(byte_fallback))
    for name, field in _IDS.items():
        token_id = ids.get(name)
        trainer += _number_field(field, -1 if token_id is None else token_id)
        if token_id is not None:
            trainer += _bytes_field(_NAMES[name], pieces[token_id].text.encode())
    normalizer = _bytes_field(_NORMALIZER_NAME, b"user_defined" if charsmap else b"identity")
    if charsmap:
        normalizer += _bytes_field(_CHARSMAP, charsmap)
    normalizer += _number_field(_DUMMY_PREFIX, int(space_prefix))
    normalizer += _number_field(_EXTRA_SPACES, int(merge_spaces))
    return b"".join([*parts, _bytes_field(_TRAINER, trainer), _bytes_field(_NORMALIZER, normalizer)])


def _write_varint(number: int) -> bytes:
    number &= (1 << 64) - 1  # a negative number takes its two's complement
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _number_field(field: int, number: int) -> bytes:
    return _write_varint(field << 3 | _VARINT) + _write_varint(number)


def _bytes_field(field: int, data: bytes) -> bytes:
    return _write_varint(field << 3 | _BYTES) + _write_varint(len(data)) + data


def _float_field(field: int, number: float) -> bytes:
    return _write_varint(field << 3 | _FIXED32) + struct.pack("<f", number)
