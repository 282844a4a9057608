"""Fixtures of the command tests: a fake model in place of nybble.load, and running a command line."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest

import nybble
from nybble.cli.main import main

from .fake_model import FakeModel


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A terminal at which nobody types."""

    def isatty(self):
        return True


@pytest.fixture
def nybble_command(capsys, monkeypatch):
    """Runs ``nybble`` in this process: ``nybble_command("run", "m", stdin="Hi")``; None: a terminal."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        code = main(list(argv))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def fake_model(monkeypatch):
    """``nybble.load`` gives this model, whatever is asked for."""
    model = FakeModel()
    monkeypatch.setattr(nybble, "load", model.load, raising=False)
    return model


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test sees or changes the cache and the history of the person who runs it."""
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setenv("NYBBLE_OFFLINE", "1")
