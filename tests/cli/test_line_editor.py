"""Messages of one and of several lines."""

from __future__ import annotations

import io
import os
import stat

import pytest

from nybble.cli import line_editor
from nybble.cli.line_editor import history_file, plain_reader, read_message


def messages(text):
    read_line = plain_reader(io.StringIO(text))
    result = []
    while (message := read_message(read_line)) is not None:
        result.append(message)
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one\ntwo\n", ["one", "two"]),
        ("last without newline", ["last without newline"]),
        ("a \\\nb\nc\n", ["a \nb", "c"]),
        ('"""first\nsecond\n"""\nnext\n', ["first\nsecond", "next"]),
        ('"""all on one line"""\n', ["all on one line"]),
        ('"""\nno end\n', ["no end"]),
        ("ends\\", ["ends\n"]),
        ("\n", [""]),
    ],
)
def test_messages(text, expected):
    assert messages(text) == expected


def test_continuation_is_told_to_the_reader():
    asked = []
    lines = iter(['"""a', 'b"""'])

    def read_line(continued):
        asked.append(continued)
        return next(lines)

    assert read_message(read_line) == "a\nb"
    assert asked == [False, True]


def test_history_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    path = history_file()
    assert tmp_path in path.parents
    assert line_editor._private_file(path)
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
