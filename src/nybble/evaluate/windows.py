"""Windows: a text cut into pieces that a model sees one at a time, and which of its tokens count.

Two ways, both those of llama.cpp's ``llama-perplexity``:

*Side by side* (no stride): window after window, none knows of another. The first half of each gives
context, the tokens after it are predicted and count: of 512 tokens the last 255. What is left at the
end of the text and fills no window is not used.

*Strided*: windows begin ``stride`` tokens apart, and the last ``stride`` tokens of each count, so that
each token is predicted once, with ``window - stride`` tokens before it at least.

A model that wants a begin token gets it in place of a window's first token. Text is text: names of
special tokens in it have no meaning.

Source: llama.cpp, ``tools/perplexity/perplexity.cpp`` (``perplexity`` and ``perplexity_v2``). Two
differences when strided: ``llama-perplexity -c C --ppl-stride S`` means windows of ``C + S / 2`` tokens,
and leaves the window's first token in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.errors import NybbleError
from nybble.text.tokenizer import Tokenizer

DEFAULT_WINDOW = 512

_CHARACTERS_A_TOKEN = 16  # more than natural text has; it is only a first guess
_MARGIN = 64  # tokens at the end of a cut text that may differ from those of the whole

Ids = npt.NDArray[np.int32]


class WindowError(NybbleError):
    """A text and windows that do not fit each other."""


@dataclass(frozen=True)
class Window:
    """One piece of the text."""

    start: int
    """Where in the text's tokens it begins."""
    tokens: tuple[int, ...]
    """Ids, a begin token in place of the first where the model wants one."""
    first_target: int
    """Index of the first token that counts; all after it do, and each is predicted by those before it."""

    @property
    def context(self) -> tuple[int, ...]:
        """Tokens to run without a look at the logits."""
        return self.tokens[: self.first_target - 1]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Tokens to run after the context: each row of their logits predicts one target."""
        return self.tokens[self.first_target - 1 : -1]

    @property
    def targets(self) -> tuple[int, ...]:
        """What is predicted, one a row."""
        return self.tokens[self.first_target :]


@dataclass(frozen=True)
class Windows:
    """All windows of a text.

    ``tokens``: ids of the text, int32 (count,), the begin tokens of ``prefix`` at its beginning included.
    ``stride`` None: side by side.
    """

    tokens: Ids
    window: int = DEFAULT_WINDOW
    stride: int | None = None
    prefix: tuple[int, ...] = ()
    most: int | None = None
    """Use so many windows at most."""

    def __post_init__(self) -> None:
        check_sizes(self.window, self.stride, self.most)
        if self.window <= len(self.prefix) + 1:
            raise ValueError(f"a window of {self.window} tokens has no room beside the begin tokens")
        if not len(self):
            raise WindowError(
                f"the text has {len(self.tokens)} tokens, fewer than one window of {self.window}:"
                " take a longer text or smaller windows"
            )

    @property
    def step(self) -> int:
        """Tokens from the beginning of one window to that of the next."""
        return self.stride or self.window

    @property
    def first_target(self) -> int:
        """The same in every window; see ``Window.first_target``."""
        wanted = self.window // 2 + 1 if self.stride is None else self.window - self.stride
        return max(wanted, len(self.prefix), 1)

    @property
    def scored(self) -> int:
        """Tokens that count, in all windows together."""
        return len(self) * (self.window - self.first_target)

    def __len__(self) -> int:
        count = max(0, (len(self.tokens) - self.window) // self.step + 1)
        return count if self.most is None else min(count, self.most)

    def __iter__(self) -> Iterator[Window]:
        for number in range(len(self)):
            start = number * self.step
            part = self.tokens[start : start + self.window].tolist()
            yield Window(start, (*self.prefix, *part[len(self.prefix) :]), self.first_target)


def check_sizes(window: int, stride: int | None, most: int | None) -> None:
    """Refuse sizes that make no windows of any text.

    Raises:
        ValueError: the message says which.
    """
    if window < 4:
        raise ValueError(f"a window has at least 4 tokens, not {window}")
    if stride is not None and not 1 <= stride < window:
        raise ValueError(
            f"the stride is between 1 and {window - 1}, a token less than the window, not {stride}"
        )
    if most is not None and most < 1:
        raise ValueError(f"there must be at least one window, not {most}")


def tokens_of(tokenizer: Tokenizer, text: str, count: int | None = None) -> Ids:
    """The ids of a text, begin tokens included: all, or the first ``count`` of them, int32.

    Of a long text only as much is looked at as ``count`` needs.
    """
    length = len(text) if count is None else count * _CHARACTERS_A_TOKEN
    while True:
        ids = tokenizer.encode(text[:length], add_special=False, parse_special=False)
        if length >= len(text) or (count is not None and len(ids) >= count + _MARGIN):
            break
        length *= 2
    return np.array([*tokenizer.prefix, *ids][:count], np.int32)


def context_before(tokenizer: Tokenizer, tokens: Sequence[int], characters: int = 60) -> str:
    """The end of a text, decoded: at most so many characters."""
    return tokenizer.decode(tokens[-characters:], skip_special=False)[-characters:]
