"""Prompts: from text or messages to the tokens that a generation starts from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nybble.text.vocabulary import TokenType

if TYPE_CHECKING:
    from nybble.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Render = Callable[..., str]
"""A chat template: ``render(messages, tools=...)`` gives the prompt, generation prompt included."""

_TRUSTED_ROLES = ("system", "developer", "assistant")


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text to go on from, with the begin token that the model wants.

    Control tokens that are written out in it are tokens. No end token is added even where the model
    wants one around a document: the text is not at its end.
    """
    return _begun(tokenizer, tokenizer.encode(text, add_special=False, parse_special=True))


def encode_chat(
    tokenizer: Tokenizer,
    render: Render,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    trust_content: bool = False,
) -> list[int]:
    """Render the template and encode it; the beginning-of-text token comes once, whoever adds it.

    Unless ``trust_content``, control tokens that are written out in messages of users and tools are
    encoded as plain text, so that a message cannot end its own turn or speak as the system. All
    other messages get exactly the tokens of the rendered text.
    """
    shield = _Shield([] if trust_content else control_texts(tokenizer))
    text = render([shield.message(message) for message in messages], tools=tools)
    tokens: list[int] = []
    for part, parse_special in shield.parts(text):
        tokens += tokenizer.encode(part, add_special=False, parse_special=parse_special)
    return _begun(tokenizer, tokens)


def control_texts(tokenizer: Tokenizer) -> list[str]:
    """How the tokens that steer the model are written."""
    vocabulary = tokenizer.vocabulary
    return [vocabulary.texts[i] for i in vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)]


def _begun(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens with the model's begin tokens before them, unless they are there already."""
    prefix = list(tokenizer.prefix)
    return tokens if tokens[: len(prefix)] == prefix else prefix + tokens


class _Shield:
    """Replaces control tokens in messages by marks that nobody can guess, and finds them again."""

    def __init__(self, control_texts: Sequence[str]) -> None:
        texts = sorted((text for text in control_texts if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._nonce = os.urandom(16).hex()
        self._hidden: list[str] = []

    def message(self, message: Message) -> Message:
        if self._control is None or not isinstance(message, Mapping) or message.get("role") in _TRUSTED_ROLES:
            return message
        return {name: value if name == "role" else self._hide(value) for name, value in message.items()}

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """The rendered text cut at the marks: (text, whether control tokens act in it)."""
        cut = re.split(f"x{self._nonce}x([0-9]+)x", text)
        return [
            (self._hidden[int(part)], False) if place % 2 else (part, True)
            for place, part in enumerate(cut)
            if part
        ]

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            assert self._control is not None
            return self._control.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {name: self._hide(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item) for item in value]
        return value

    def _mark(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"x{self._nonce}x{len(self._hidden) - 1}x"
