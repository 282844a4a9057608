"""Reply: what a generation gives back besides the text, and the pieces that it streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nybble.generate.logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""``stop``: the model ended its answer, or a stop string or token came; ``length``: max_tokens;
``context``: the context is full; ``cancelled``: cancelled or closed before its end."""


@dataclass(frozen=True)
class Usage:
    """Tokens counted. ``cached_tokens`` of the prompt were reused and not computed."""

    prompt_tokens: int
    completion_tokens: int
    """Over all choices, end-of-text tokens included."""
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds of computing; time that the consumer of a stream takes is not counted."""

    load: float
    """Loading the model, once."""
    prefill: float
    """From the start of the request until the logits after the prompt."""
    decode: float
    """Everything after that."""
    prefill_tokens: int = 0
    """Prompt tokens that were computed."""
    decode_tokens: int = 0
    """Tokens that were generated, over all choices."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """0 when the whole prompt was cached."""
        return self.prefill_tokens / self.prefill if self.prefill > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens a second; the first token of a choice is drawn from the prefill."""
        return self.decode_tokens / self.decode if self.decode > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """One completion. ``token_ids`` includes the token that ended it, ``text`` does not."""

    index: int
    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry a token, if asked for."""
    stop: str | int | None = None
    """The stop string or the id of the token that ended the text."""


@dataclass(frozen=True)
class Reply:
    """A finished generation; the first choice's fields are the reply's own."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    seed: int
    """The seed that was used: passing it again gives the same text."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log-probabilities of the first choice."""
        return self.choices[0].logprobs


@dataclass(frozen=True)
class Piece:
    """What one step added to one choice: usually one token and its text.

    ``text`` may be empty while a character or a possible stop string is incomplete. The last
    piece of a choice has a ``finish_reason``.
    """

    index: int
    text: str
    token: int | None = None
    """None: text that was held back until the end."""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
