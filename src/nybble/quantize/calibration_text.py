"""Text that calibration runs: read from files, rendered, cut into windows of tokens.

What can be read: text files in UTF-8, files of JSON lines, and folders of both. A line of JSON is a
document: ``{"text": ...}``, or a chat, ``{"messages": [{"role": ..., "content": ...}, ...]}``, which goes
through the model's chat template. Without a file nybble's own text is taken
(``data/calibration.txt``, with its sources beside it).

Every choice is a function of the texts and the seed, the same on every machine.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import FormatError, NotFoundError, TemplateError
from nybble.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
Render = Callable[[Sequence[dict[str, Any]]], str]
"""A chat's messages to the text that the model was trained on."""

SUFFIXES = (".txt", ".md", ".rst", ".text", ".jsonl", ".ndjson", ".py", ".c", ".cpp", ".h", ".js", ".html")
"""Files of a folder that are read."""
_JSON_LINES = (".jsonl", ".ndjson")
_PIECE = 16 << 10  # characters of a text that are chosen or left out together
_CHARACTERS = 16  # more than a token has on average in any text: so many are kept for each one needed
_MARGIN = 1.25  # more tokens than windows need: which of them are taken is drawn too


@dataclass(frozen=True)
class Document:
    """A piece of text, or a chat. ``source`` says where it is from."""

    source: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] = ()


def default_text() -> str:
    """The text that is shipped with nybble: prose, dialogue, code, tables and arithmetic, mixed."""
    return resources.files("nybble.quantize").joinpath("data/calibration.txt").read_text(encoding="utf-8")


def read_documents(paths: Sequence[str | os.PathLike[str]] = ()) -> Iterator[Document]:
    """The documents of files and folders in order of their names; of no path: the default text.

    Raises:
        NotFoundError: a path does not exist, or a folder has no file that could be read.
        FormatError: a file is not UTF-8, or a line of JSON is no document.
    """
    if not paths:
        yield Document("nybble's calibration text", default_text())
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
            if not files:
                raise NotFoundError(f"{path}: no file with text (*{', *'.join(SUFFIXES)})")
        elif path.is_file():
            files = [path]
        else:
            raise NotFoundError(f"{path}: no such file or folder of texts")
        for file in files:
            if file.suffix in _JSON_LINES:
                yield from _json_lines(file)
            else:
                yield from _text(file)


def _text(path: Path) -> Iterator[Document]:
    """A file in parts of a megabyte, cut at ends of lines: texts may be larger than memory."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while lines := file.readlines(1 << 20):
                yield Document(str(path), "".join(lines))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 text: {error.reason}") from None


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{where}: is not JSON: {error}") from None
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                yield Document(where, row["text"])
            elif isinstance(row, dict) and _are_messages(row.get("messages")):
                yield Document(where, None, tuple(row["messages"]))
            else:
                raise FormatError(
                    f'{where}: must be {{"text": "..."}} or'
                    ' {"messages": [{"role": "user", "content": "..."}, ...]}'
                )


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value)
    )


# -- windows -------------------------------------------------------------------------------------------


def make_windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    windows: int,
    length: int,
    seed: int = 0,
    render: Render | None = None,
) -> list[Tokens]:
    """Windows of ``length`` tokens each, for a calibration.

    Texts are cut into pieces of about 16,000 characters at ends of lines. Where there is more than is
    needed, pieces are drawn by a hash of the seed and their number, and so are the windows at the end;
    both keep the order of the texts. The tokens of all chosen pieces are strung together and cut. Each
    window begins with the tokens that the model wants at the beginning of a document.

    Args:
        documents: texts and chats.
        tokenizer: the model's.
        windows: how many; fewer come where there is too little text.
        length: tokens of each; where all the text is shorter, there is one window of what there is.
        seed: another seed draws others.
        render: the chat template, for chats.

    Returns:
        int32 (length,) each, at least one.

    Raises:
        TemplateError: there are chats and the model has no chat template, or it refuses one.
        FormatError: there is no text.
        ValueError: ``windows`` or ``length`` is too small.
    """
    prefix = list(tokenizer.prefix)
    if windows < 1 or length <= len(prefix):
        raise ValueError(
            f"{windows} windows of {length} tokens cannot be made; at least 1 of {len(prefix) + 1}"
        )
    body = length - len(prefix)
    needed = int(windows * body * _MARGIN)
    pieces = _first_drawn(
        (piece for document in documents for piece in _pieces(document, render)), seed, needed * _CHARACTERS
    )
    ids = _drawn_ids(pieces, tokenizer, seed, needed)
    stream = [token for number in sorted(ids) for token in ids[number]]
    if not stream:
        raise FormatError("the calibration text is empty")
    count = len(stream) // body
    if count == 0:
        return [np.array([*prefix, *stream], np.int32)]
    numbers = sorted(sorted(range(count), key=lambda number: _rank(seed, "window", number))[:windows])
    return [np.array([*prefix, *stream[number * body : (number + 1) * body]], np.int32) for number in numbers]


@dataclass(frozen=True)
class _Piece:
    text: str
    is_chat: bool


def _pieces(document: Document, render: Render | None) -> Iterator[_Piece]:
    if document.text is None:
        if render is None:
            raise TemplateError(
                f"{document.source}: is a chat, and the model has no chat template; give texts instead"
            )
        try:
            yield _Piece(render(document.messages), True)
        except TemplateError as error:
            raise TemplateError(f"{document.source}: {error}") from error
        return
    text, begin = document.text, 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            cut = text.rfind("\n", begin + _PIECE // 2, end)
            end = cut + 1 if cut >= 0 else end
        yield _Piece(text[begin:end], False)
        begin = end


def _first_drawn(pieces: Iterable[_Piece], seed: int, characters: int) -> dict[int, _Piece]:
    """Those that are drawn first, by number, with so many characters together; no others stay in memory."""
    # The one that is drawn last is at the top of the heap.
    kept: list[tuple[int, int, _Piece]] = []
    total = 0
    for number, piece in enumerate(pieces):
        rank = int.from_bytes(_rank(seed, "piece", number), "big")
        heapq.heappush(kept, (-rank, number, piece))
        total += len(piece.text)
        while total - len(kept[0][2].text) >= characters:
            total -= len(heapq.heappop(kept)[2].text)
    return {number: piece for _, number, piece in kept}


def _drawn_ids(
    pieces: Mapping[int, _Piece], tokenizer: Tokenizer, seed: int, tokens: int
) -> dict[int, list[int]]:
    """Token ids of as many pieces as have so many, by the piece's number; only those are tokenized."""
    prefix = list(tokenizer.prefix)
    found: dict[int, list[int]] = {}
    total = 0
    for number in sorted(pieces, key=lambda number: _rank(seed, "piece", number)):
        if total >= tokens:
            break
        piece = pieces[number]
        ids = tokenizer.encode(piece.text, add_special=False, parse_special=piece.is_chat)
        if piece.is_chat and ids[: len(prefix)] == prefix:
            del ids[: len(prefix)]  # the template wrote what every window gets
        found[number] = ids
        total += len(ids)
    return found


def _rank(seed: int, kind: str, number: int) -> bytes:
    # A hash and no random generator: NumPy's and Python's may draw differently in later versions.
    return hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
