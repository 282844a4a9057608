"""``nybble chat``: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nybble.cli import console
from nybble.cli.line_editor import history_file, plain_reader, read_message, terminal_reader
from nybble.cli.loading import load, require_template
from nybble.cli.main import UsageError
from nybble.cli.options import (
    NOT_IN_CHAT,
    add_generation_arguments,
    add_load_arguments,
    add_model_argument,
    add_prompt_arguments,
    generation_options,
)

EPILOG = """\
In the chat, /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.
A message of several lines begins and ends with three quotation marks; a \\ at a line's end
or Alt-Enter goes on too. Lines from a pipe are answered one after another.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble chat``."""
    add_model_argument(parser)
    prompt = add_prompt_arguments(parser)
    prompt.add_argument(
        "--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote"
    )
    prompt.add_argument("--no-history", action="store_true", help="do not keep what you type in a file")
    output = parser.add_argument_group("output")
    output.add_argument("--timings", "--verbose", action="store_true", help="timings after each answer")
    add_generation_arguments(parser, without=NOT_IN_CHAT)
    add_load_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends or /quit."""
    from nybble.cli.chat_session import COMMANDS, ChatSession, Quit, read_conversation

    options = generation_options(arguments)
    if arguments.load is not None and arguments.system is not None:
        raise UsageError("--load brings its own system message: leave --system out")
    earlier = read_conversation(arguments.load) if arguments.load is not None else None
    model = load(arguments)
    require_template(model, arguments)
    session = ChatSession(model, arguments.model, options, arguments.system)
    session.show_stats = arguments.timings
    if earlier is not None:
        session.continue_from(earlier)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        console.note(f"{arguments.model}; /help lists the commands, Ctrl-D leaves")
        read_line = terminal_reader(None if arguments.no_history else history_file(), list(COMMANDS))
    else:
        read_line = plain_reader(sys.stdin)
    while True:
        try:
            message = read_message(read_line)
            if message is None:
                break
            session.handle(message)
        except KeyboardInterrupt:
            # At the prompt: the line is thrown away. An answer catches its own.
            if not terminal:
                raise
            console.note("Ctrl-D or /quit leaves")
        except Quit:
            break
    return 0
