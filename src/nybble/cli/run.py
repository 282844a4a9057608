"""``nybble run``: one prompt, one answer, as text alone or as one JSON object."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from nybble.cli import console
from nybble.cli.interrupt import interruptible
from nybble.cli.loading import load, require_template
from nybble.cli.main import UsageError
from nybble.cli.options import (
    add_generation_arguments,
    add_load_arguments,
    add_model_argument,
    add_prompt_arguments,
    generation_options,
)
from nybble.cli.report import reply_json, timing_line

if TYPE_CHECKING:
    from nybble.generate.generation import Stream
    from nybble.generate.reply import Reply
    from nybble.model import Model

EPILOG = """\
examples:
  nybble run smollm2 "Why is the sky blue?"
  nybble run smollm2 --raw --max-tokens 20 "Once upon a time"
  nybble run smollm2 - --system "Summarise this text" < article.txt
  nybble run smollm2 --json --temperature 0 "Hi" | jq .timings

The text alone goes to standard output; progress and notes go to standard error.
A prompt that begins with - comes after --:  nybble run smollm2 -- "-1 + 1 = ?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``nybble run``."""
    add_model_argument(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the prompt; - or none: read standard input"
    )
    prompt = add_prompt_arguments(parser)
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it is, no chat template")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="one object: text, tokens, finish reason, usage, timings"
    )
    output.add_argument(
        "--timings", "--verbose", action="store_true", help="usage and timings on standard error"
    )
    add_generation_arguments(parser)
    add_load_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer the prompt."""
    options = generation_options(arguments)
    _check(arguments)
    prompt = _prompt(arguments.prompt)
    model = load(arguments)
    reply = _generate(model, arguments, prompt, options)
    if arguments.json:
        console.write_json(reply_json(reply, arguments.model))
    if arguments.timings:
        console.note(timing_line(reply))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("system", "chat_template"):
        if arguments.raw and getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} means nothing with --raw, which uses no template")
    if not arguments.json and (arguments.n or arguments.logprobs is not None):
        raise UsageError("--n and --logprobs need --json")


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("no prompt: give one, pipe one in, or use nybble chat")
    text = sys.stdin.read()
    # Commands end their output with a newline that nobody means; files that need it have two.
    return text[:-1] if text.endswith("\n") else text


def _generate(model: Model, arguments: argparse.Namespace, prompt: str, options: dict[str, Any]) -> Reply:
    stream = _start(model, arguments, prompt, options)
    last = ""
    with closing(interruptible(stream, stream.cancel)) as pieces:
        for piece in pieces:
            if not arguments.json:
                console.write(piece)
                last = piece or last
    if not arguments.json and not last.endswith("\n"):
        console.write("\n")
    return stream.reply


def _start(model: Model, arguments: argparse.Namespace, prompt: str, options: dict[str, Any]) -> Stream:
    """The stream of the answer; nothing is computed yet."""
    if not arguments.raw:
        require_template(model, arguments)
    try:
        if arguments.raw:
            return model.stream(prompt, **options)
        messages = [{"role": "user", "content": prompt}]
        if arguments.system is not None:
            messages.insert(0, {"role": "system", "content": arguments.system})
        return model.stream_chat(messages, **options)
    except ValueError as error:  # an option that only the model can judge, such as a token id
        raise UsageError(str(error)) from error
