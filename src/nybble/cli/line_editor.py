"""Reading what the user types in ``nybble chat``: one message at a time, of one or more lines.

A message goes over several lines when it starts with three quotation marks (until the next
three), when a line ends in a backslash, or, at a terminal, with Alt-Enter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

QUOTES = '"""'

ReadLine = Callable[[bool], "str | None"]
"""Reads one line without its end; the argument says whether it continues a message. None: the end."""


def read_message(read_line: ReadLine) -> str | None:
    """The next message, or None when the input has ended."""
    line = read_line(False)
    if line is None:
        return None
    if line.lstrip().startswith(QUOTES):
        return _quoted(line.lstrip()[len(QUOTES) :], read_line)
    lines = []
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line(True)
    lines.append(line or "")
    return "\n".join(lines)


def _quoted(line: str, read_line: ReadLine) -> str:
    lines = []
    current: str | None = line
    while current is not None:
        text, mark, _ = current.partition(QUOTES)
        lines.append(text)
        if mark:
            break
        current = read_line(True)
    return "\n".join(lines).strip("\n")


def plain_reader(stream: TextIO) -> ReadLine:
    """Reads lines from a pipe or a file, with no prompt."""

    def read_line(continued: bool) -> str | None:
        line = stream.readline()
        return line.rstrip("\n") if line else None

    return read_line


def terminal_reader(history: Path | None, commands: list[str]) -> ReadLine:
    """Reads from the terminal with editing, history and completion of ``commands``.

    ``history`` is the file that earlier messages are kept in; None keeps them in memory. Ctrl-C
    raises KeyboardInterrupt, Ctrl-D ends the input.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    past: History = InMemoryHistory()
    if history is not None and _private_file(history):
        past = FileHistory(str(history))
    session: PromptSession[str] = PromptSession(
        history=past,
        key_bindings=bindings,
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        prompt_continuation="... ",
    )

    def read_line(continued: bool) -> str | None:
        try:
            return session.prompt("... " if continued else ">>> ")
        except EOFError:
            return None

    return read_line


def history_file() -> Path:
    """Where this system keeps such files: ``chat_history`` in nybble's state folder."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "nybble" / "chat_history"


def _private_file(path: Path) -> bool:
    """Whether the file can be written; made readable by its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return False
    return os.access(path, os.W_OK)
