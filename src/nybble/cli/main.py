"""The ``nybble`` command: finds the command's module, runs it, and turns errors into exit codes.

Exit codes: 0 done; 1 failed, with a message; 2 wrong use; 130 interrupted by Ctrl-C; 141 the
reader of standard output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import nybble
from nybble.cli import console
from nybble.errors import NybbleError

COMMANDS = {
    "run": "answer a prompt",
    "chat": "talk with a model in the terminal",
    "pull": "download models into the cache",
    "list": "models in the cache, and those known by name",
    "remove": "delete models from the cache",
    "inspect": "what a model file holds, without loading it",
    "convert": "write a model in another format",
    "quantize": "write a model with fewer bits, by a recipe",
    "calibrate": "measure which weights matter, for quantizers",
    "verify": "compare a converted model with its manifest",
    "devices": "devices found, the one chosen, and why",
    "bench": "measure prefill and decode",
    "evaluate": "compare models on a text: quality, size, speed",
    "version": "versions of nybble and what it runs on",
}
"""Name and summary of each command; the module is ``nybble.cli.<name>``."""

DONE = 0
FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130
OUTPUT_CLOSED = 141

_EPILOG = """\
examples:
  nybble run smollm2 "Why is the sky blue?"
  git diff | nybble run smollm2 - --system "Write a commit message"
  nybble chat smollm2

MODEL is a known name (nybble list --known), a GGUF file, a folder, a URL, hf:owner/repo[/file] or
pypi:package. "nybble COMMAND --help" explains one command.
"""


class UsageError(Exception):
    """The command line is wrong in a way that its parser could not see."""


class Parser(argparse.ArgumentParser):
    """A parser whose long options are never abbreviated and whose help keeps its line breaks."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit code 2."""
        self.print_usage(sys.stderr)
        console.error(f'{message} ("{self.prog} --help" explains)')
        self.exit(WRONG_USE)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Line breaks kept, and room for the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    console.prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in _before_separator(arguments)
    try:
        return _dispatch(arguments)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else DONE
    except KeyboardInterrupt:
        if traceback:
            raise
        return INTERRUPTED
    except console.OutputClosed:
        _silence_stdout()
        return OUTPUT_CLOSED
    except NybbleError as error:
        if traceback:
            raise
        console.error(str(error))
    except OSError as error:
        if traceback:
            raise
        console.error(str(error))
    except Exception as error:
        if traceback:
            raise
        console.error(
            f"unexpected {type(error).__name__}: {error} (a bug in nybble: --traceback shows where)"
        )
    return FAILED


def main_parser() -> Parser:
    """The parser of ``nybble`` itself; what follows the command's name is left to the command."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        "nybble",
        f"Run small language models.\n\ncommands:\n{table}",
        _EPILOG,
    )
    parser.usage = "nybble [--version] [--traceback] COMMAND ..."
    parser.add_argument("--version", action="store_true", help="print nybble's version and exit")
    add_global_arguments(parser)
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def command_parser(name: str) -> tuple[Parser, ModuleType]:
    """The parser of one command, and the command's module."""
    module = importlib.import_module(f"nybble.cli.{name}")
    summary = COMMANDS[name]
    parser = Parser(f"nybble {name}", f"{summary[0].upper()}{summary[1:]}.", getattr(module, "EPILOG", None))
    module.add_arguments(parser)
    add_global_arguments(parser)
    # argparse would list every option here; two dozen of them hide what matters.
    arguments = "".join(f" {_shown(action)}" for action in parser._get_positional_actions())
    parser.usage = f"nybble {name} [options]{arguments}"
    return parser, module


def add_global_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that stand before or after the command's name."""
    parser.add_argument("--traceback", action="store_true", help="on failure, show where it happened")


def _dispatch(arguments: list[str]) -> int:
    position = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    own, rest = arguments[: position + 1], arguments[position + 1 :]
    parser = main_parser()
    chosen = parser.parse_args(own)
    if chosen.version:
        console.write(f"nybble {nybble.__version__}\n")
        return DONE
    if chosen.command is None:
        parser.print_help()
        return WRONG_USE
    if chosen.command not in COMMANDS:
        near = difflib.get_close_matches(chosen.command, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        parser.error(f"unknown command {chosen.command!r}; {hint}")
    command, module = command_parser(chosen.command)
    parsed = command.parse_intermixed_args(rest)
    try:
        result = int(module.run(parsed))
        console.flush()
    except UsageError as error:
        command.error(str(error))
    return result


def _shown(action: argparse.Action) -> str:
    name = str(action.metavar)
    return {"?": f"[{name}]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)


def _before_separator(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _silence_stdout() -> None:
    # Python flushes standard output once more at exit and would print an error about it.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
