"""Reading texts and chats, and cutting them into windows."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import FormatError, NotFoundError, TemplateError
from nybble.quantize.calibration_text import (
    Document,
    _first_drawn,
    _Piece,
    _rank,
    default_text,
    make_windows,
    read_documents,
)
from nybble.text.tokenizer import GGUFTokenizerSource, Tokenizer
from support.conversions import tokenizer_keys


class Letters(Tokenizer):
    """A token a character, and a begin token."""

    def __init__(self, prefix: tuple[int, ...] = (1,)) -> None:
        self.prefix = prefix
        self.suffix = ()
        self.seen: list[tuple[str, bool]] = []

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        assert not add_special
        self.seen.append((text, parse_special))
        return [ord(character) + 10 for character in text]


def letters(window: np.ndarray) -> str:
    """The text of a window without its begin token."""
    return "".join(chr(int(token) - 10) for token in window[1:])


def test_files_folders_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\ufeffsecond", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\xff")
    inner = tmp_path / "inner"
    inner.mkdir()
    messages = [{"role": "user", "content": "Hi"}]
    rows = [{"text": "third"}, {"messages": messages}]
    (inner / "c.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = list(read_documents([tmp_path]))
    assert [document.text for document in found] == ["first", "second", "third", None]
    assert found[3].messages == tuple(messages)
    assert found[3].source.endswith("c.jsonl, line 3")
    assert [document.text for document in read_documents([tmp_path / "b.txt"])] == ["second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 3}', r"line 2: must be {\"text\": ..."),
        (b"{", "line 1: is not JSON"),
        (b'{"messages": []}', "line 1: must be"),
        (b'{"messages": [{"content": "a"}]}', "line 1: must be"),
        (b"[" * 100_000, "line 1: is not JSON"),
    ],
)
def test_lines_that_are_no_documents(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        list(read_documents([path]))


def test_paths_without_text(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file or folder"):
        list(read_documents([tmp_path / "nothing"]))
    with pytest.raises(NotFoundError, match="no file with text"):
        list(read_documents([tmp_path]))
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(FormatError, match="is not UTF-8 text: invalid start byte"):
        list(read_documents([path]))


def test_the_default_text_is_a_mixture_of_what_its_readme_says() -> None:
    (document,) = read_documents()
    assert document.text == default_text()
    assert 100_000 < len(document.text.encode()) < 200_000
    for part in (
        "Photosynthesis",
        "Am Morgen nach dem Sturm",
        "def rms_norm",
        "namespace nybble",
        "SELECT name",
    ):
        assert part in document.text
    # Any quarter has something of most kinds.
    size = len(document.text) // 4
    for begin in range(0, 4 * size, size):
        quarter = document.text[begin : begin + size]
        assert "SELECT" in quarter and "Question: What is" in quarter and "return" in quarter


def test_each_window_begins_with_what_a_document_does() -> None:
    text = "".join(chr(33 + i % 90) for i in range(95))
    windows = make_windows([Document("t", text)], Letters(), windows=20, length=11)
    assert len(windows) == 9  # the last 5 characters fill no window
    assert all(window.dtype == np.int32 and len(window) == 11 and window[0] == 1 for window in windows)
    assert "".join(map(letters, windows)) == text[:90]


def test_a_short_text_is_one_short_window() -> None:
    (window,) = make_windows([Document("t", "abc")], Letters(), windows=20, length=11)
    assert letters(window) == "abc"


def test_names_of_special_tokens_in_texts_are_text_but_chats_have_them() -> None:
    chat = Document("c", None, ({"role": "user", "content": "Hi"},))
    tokenizer = Letters()
    (window,) = make_windows(
        [Document("t", "<s>"), chat],
        tokenizer,
        windows=1,
        length=100,
        render=lambda messages: f"<s>{messages[0]['content']}",
    )
    assert sorted(tokenizer.seen) == [("<s>", False), ("<s>Hi", True)]
    assert letters(window) == "<s><s>Hi"


def test_the_begin_token_that_a_template_writes_is_not_doubled() -> None:
    tokenizer = GGUFTokenizerSource(tokenizer_keys()).build()
    chat = Document("c", None, ({"role": "user", "content": "ab"},))
    (window,) = make_windows(
        [chat], tokenizer, windows=1, length=50, render=lambda messages: "<s>" + messages[0]["content"]
    )
    assert window.tolist().count(1) == 1 and window[0] == 1


def test_chats_without_a_template() -> None:
    chat = Document("file, line 7", None, ({"role": "user", "content": "Hi"},))
    with pytest.raises(TemplateError, match="file, line 7: is a chat, and the model has no chat template"):
        make_windows([chat], Letters(), windows=1, length=50)


@pytest.mark.parametrize(("windows", "length"), [(0, 50), (1, 1)])
def test_no_windows(windows: int, length: int) -> None:
    with pytest.raises(ValueError, match="cannot be made; at least 1 of 2"):
        make_windows([Document("t", "abc")], Letters(), windows=windows, length=length)
    with pytest.raises(FormatError, match="is empty"):
        make_windows([Document("t", "")], Letters(), windows=1, length=50)


def test_of_a_long_text_the_seed_chooses_and_the_order_stays() -> None:
    lines = [f"{number:07}" for number in range(40_000)]
    document = Document("t", "\n".join(lines) + "\n")
    drawn = {
        seed: [
            letters(window)
            for window in make_windows([document], Letters(), windows=20, length=81, seed=seed)
        ]
        for seed in (0, 1)
    }
    again = make_windows([document], Letters(), windows=20, length=81, seed=0)
    assert [letters(window) for window in again] == drawn[0]
    assert drawn[0] != drawn[1]
    # What was drawn stays the same in every version: these lines begin the windows of seed 0.
    assert all(len(texts) == 20 and texts == sorted(texts) for texts in drawn.values())
    tokenizer = Letters()
    make_windows([document], tokenizer, windows=20, length=81)
    # No more was tokenized than needed: 20 windows of 80 letters, and a margin.
    assert len(tokenizer.seen) == 1 and len(tokenizer.seen[0][0]) <= 16 << 10


def test_large_texts_are_read_in_parts_and_what_is_not_drawn_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{number:07}\n" for number in range(300_000)), encoding="utf-8")
    parts = [document.text or "" for document in read_documents([path])]
    assert len(parts) == 3 and all(part.endswith("\n") for part in parts)
    assert "".join(parts) == path.read_text(encoding="utf-8")

    alive: list[weakref.ref[_Piece]] = []

    def pieces() -> Iterator[_Piece]:
        for number in range(2000):
            assert sum(reference() is not None for reference in alive[-200:]) < 60
            piece = _Piece(f"{number:05}" * 20, False)
            alive.append(weakref.ref(piece))
            yield piece

    kept = _first_drawn(pieces(), 0, 3000)
    assert len(kept) == 30
    # Just those that a draw of all would begin with.
    order = sorted(range(2000), key=lambda number: _rank(0, "piece", number))
    assert set(kept) == set(order[:30])


@given(
    text=st.text(min_size=1, max_size=900),
    windows=st.integers(1, 6),
    length=st.integers(2, 60),
    seed=st.integers(0, 3),
)
def test_windows_are_pieces_of_the_text(text: str, windows: int, length: int, seed: int) -> None:
    found = make_windows([Document("t", text)], Letters(), windows=windows, length=length, seed=seed)
    body = length - 1
    if len(text) < body:
        assert [letters(window) for window in found] == [text]
        return
    assert len(found) == min(windows, len(text) // body)
    cut = [text[begin : begin + body] for begin in range(0, len(text) - body + 1, body)]
    place = -1
    for window in found:
        place = cut.index(letters(window), place + 1)
