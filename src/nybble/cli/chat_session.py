"""A conversation in the terminal: its messages, its options and its ``/commands``.

Knows nothing of how lines are read; ``cli/chat.py`` feeds it one message at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.cli import console
from nybble.cli.interrupt import interruptible
from nybble.cli.main import UsageError
from nybble.cli.options import GENERATION, NOT_IN_CHAT, parse_setting
from nybble.cli.report import timing_line
from nybble.errors import NybbleError

if TYPE_CHECKING:
    from nybble.generate.reply import Reply
    from nybble.model import Model

_ROLES = ("system", "user", "assistant", "tool")


class Quit(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """A ``/command`` of the conversation."""

    name: str
    arguments: str
    help: str
    run: Callable[[ChatSession, str], None]


class ChatSession:
    """One conversation with one model.

    ``messages`` is what the model sees: a system message first, if there is one. ``options`` are
    the generation options that differ from the model's defaults.
    """

    def __init__(self, model: Model, model_name: str, options: dict[str, Any], system: str | None) -> None:
        self.model = model
        self.model_name = model_name
        self.options = options
        self.system = system
        self.show_stats = False
        self.last_reply: Reply | None = None
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def continue_from(self, messages: list[dict[str, Any]]) -> None:
        """Go on with these messages; their system message becomes this conversation's."""
        self.messages = messages
        first = messages[0] if messages else {}
        self.system = first.get("content") if first.get("role") == "system" else None

    def handle(self, line: str) -> None:
        """Obey a ``/command``, or answer a message.

        Raises:
            Quit: the user asked to leave.
        """
        stripped = line.strip()
        if not stripped:
            return
        if stripped.startswith("/"):
            self.command(stripped)
        else:
            self.answer(line)

    def command(self, line: str) -> None:
        """Obey a ``/command``; what is wrong with it is said, not raised."""
        name, _, rest = line.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            console.error(f"no command {name}; /help lists them (a message cannot begin with /)")
            return
        try:
            command.run(self, rest.strip())
        except (UsageError, NybbleError, OSError, ValueError) as error:
            console.error(f"{name}: {error}")

    def answer(self, text: str) -> None:
        """Send a message and print the answer as it comes.

        Ctrl-C ends the answer; what was said until then stays in the conversation. When the model
        fails, the message is taken back.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        said = False
        interrupted = False
        try:
            stream = self.model.stream_chat(self.messages, **self.options)
            try:
                with closing(interruptible(stream, stream.cancel)) as pieces:
                    for piece in pieces:
                        console.write(piece)
                        said = True
            except KeyboardInterrupt:
                interrupted = True
        except (NybbleError, ValueError) as error:
            self.messages = before
            console.write("\n" if said else "")
            console.error(str(error))
            return
        console.write("\n")
        if interrupted and not said:
            self.messages = before
            console.note("stopped; your message was taken back")
            return
        self.last_reply = stream.reply
        self.messages.append({"role": "assistant", "content": self.last_reply.text})
        self._comment(self.last_reply, interrupted)

    def _comment(self, reply: Reply, interrupted: bool) -> None:
        if interrupted:
            console.note("stopped")
        elif reply.finish_reason == "length":
            console.note("cut off at max_tokens; /set max_tokens N allows more")
        elif reply.finish_reason == "context":
            console.note("the context is full; /reset begins again")
        if self.show_stats:
            console.note(timing_line(reply))


def _help(session: ChatSession, rest: str) -> None:
    width = max(len(f"{c.name} {c.arguments}") for c in COMMANDS.values())
    for command in COMMANDS.values():
        console.write(f"  {f'{command.name} {command.arguments}':{width}}  {command.help}\n")
    console.write(
        '  """ begins and ends a message of several lines; so does \\ at a line\'s end, or Alt-Enter\n'
    )
    console.write("  Ctrl-C stops the answer, Ctrl-D leaves\n")


def _reset(session: ChatSession, rest: str) -> None:
    session.reset()
    console.note("the conversation begins anew")


def _system(session: ChatSession, rest: str) -> None:
    if rest:
        session.system = rest
        session.reset()
        console.note("system message set; the conversation begins anew")
    else:
        console.write(f"{session.system or '(no system message)'}\n")


def _set(session: ChatSession, rest: str) -> None:
    name, _, text = rest.partition(" ")
    if not name:
        for key, value in session.options.items():
            console.write(f"  {key} = {value!r}\n")
        if not session.options:
            console.write("  all options have the model's defaults\n")
        console.write(f"  options: {', '.join(o.name for o in GENERATION if o.name not in NOT_IN_CHAT)}\n")
        return
    name = name.replace("-", "_")
    text = text.strip()
    if name in NOT_IN_CHAT:
        raise UsageError(f"{name} has no use in a chat")
    if text in ("", "default"):
        parse_name_only(name)
        session.options.pop(name, None)
        console.note(f"{name} has the model's default")
        return
    name, value = parse_setting(name, text)
    session.options[name] = value
    console.note(f"{name} = {value!r}")


def parse_name_only(name: str) -> None:
    """Raise UsageError unless an option has this name."""
    if name not in {option.name for option in GENERATION}:
        parse_setting(name, "")


def _save(session: ChatSession, rest: str) -> None:
    path = _path(rest)
    text = json.dumps(
        {"model": session.model_name, "messages": session.messages}, indent=2, ensure_ascii=False
    )
    path.write_text(text + "\n", encoding="utf-8")
    console.note(f"saved {len(session.messages)} messages to {path}")


def _load(session: ChatSession, rest: str) -> None:
    path = _path(rest)
    session.continue_from(read_conversation(path))
    console.note(f"loaded {len(session.messages)} messages from {path}")


def read_conversation(path: Path) -> list[dict[str, Any]]:
    """Messages of a file that ``/save`` wrote, or of a plain JSON list of messages.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be read.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise ValueError(f"{path} holds no list of messages")
    for i, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"{path}: message {i} lacks a role ({', '.join(_ROLES)}) or a text as content")
    return messages


def _stats(session: ChatSession, rest: str) -> None:
    if rest in ("on", "off"):
        session.show_stats = rest == "on"
    elif rest:
        raise UsageError("on, off or nothing")
    elif session.last_reply is None:
        console.write("no answer yet\n")
    else:
        console.write(timing_line(session.last_reply) + "\n")


def _quit(session: ChatSession, rest: str) -> None:
    raise Quit


def _path(text: str) -> Path:
    if not text:
        raise UsageError("name a file")
    return Path(text).expanduser()


COMMANDS = {
    command.name: command
    for command in (
        Command("/help", "", "this list", _help),
        Command("/reset", "", "begin anew, with the same system message", _reset),
        Command("/system", "[TEXT]", "show the system message, or set it and begin anew", _system),
        Command(
            "/set", "[OPTION VALUE]", "show the options, or set one (VALUE default: the model's own)", _set
        ),
        Command("/stats", "[on|off]", "times of the last answer, or of every answer to come", _stats),
        Command("/save", "FILE", "write the conversation as JSON", _save),
        Command("/load", "FILE", "go on with a saved conversation", _load),
        Command("/quit", "", "leave", _quit),
    )
}
