"""Tables, numbers and colours."""

from __future__ import annotations

import io

import pytest

from nybble.cli import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_362_432, "98.4 MB"),
        (999_960, "1.0 MB"),
        (5.12e12, "5120.0 GB"),
    ],
)
def test_size(count, text):
    assert console.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (134_515_008, "134.5 M"), (3.8e9, "3.8 B")])
def test_number(count, text):
    assert console.number(count) == text


def test_table_aligns():
    text = console.table(("NAME", "SIZE"), [("a", 5), ("longer", 1234)], right=("SIZE",))
    assert text == "NAME    SIZE\na          5\nlonger  1234\n"


def test_table_shows_control_characters():
    text = console.table(("NAME",), [("a\x1b[31m\nb",)])
    assert text.splitlines()[1] == "a\\x1b[31m\\nb"


def test_colours_only_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.styled("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert console.styled("x", "red", io.StringIO()) == "x"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_when_not_wanted(monkeypatch, name, value):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    assert console.styled("x", "red", Terminal()) == "x"
