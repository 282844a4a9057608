"""Writer: one choice of a generation: its sampler, its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from nybble.devices.base import Sequence
from nybble.generate.candidates import Logits
from nybble.generate.logprobs import TokenLogprob, token_logprob
from nybble.generate.options import GenerationOptions
from nybble.generate.reply import Choice, FinishReason, Piece
from nybble.generate.sampler import Sampler
from nybble.generate.stop import StopStrings


class TextDecoder(Protocol):
    """Turns tokens into text one by one and never gives half a character."""

    def add(self, token_id: int, /) -> str:
        """The text that is certain after this token."""
        ...

    def finish(self) -> str:
        """What is left at the end."""
        ...


class Writer:
    """Takes a row of logits a step and gives the piece of text that follows from it."""

    def __init__(
        self,
        index: int,
        options: GenerationOptions,
        sampler: Sampler,
        decoder: TextDecoder,
        end_tokens: Collection[int],
    ) -> None:
        self.index = index
        self.sequence: Sequence | None = None
        """Where this choice's tokens are computed, while it runs."""
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        self._options = options
        self._sampler = sampler
        self._decoder = decoder
        self._ends = frozenset(options.stop_tokens) | frozenset(() if options.ignore_eos else end_tokens)
        self._eos = tuple(end_tokens)
        self._stops = StopStrings(options.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._stop: str | int | None = None

    def step(self, logits: Logits) -> Piece:
        """Draw the next token from logits (vocab_size,)."""
        options = self._options
        token = self._sampler.sample(logits, self._forbidden())
        self.token_ids.append(token)
        logprob = None
        if options.logprobs is not None:
            logprob = token_logprob(logits, token, options.logprobs)
            self._logprobs.append(logprob)
        text = ""
        if token in self._ends:
            self._stop = token
            text = self._end("stop")
        else:
            text = self._stops.push(self._decoder.add(token))
            if self._stops.found is not None:
                self._stop = self._stops.found
                self.finish_reason = "stop"
            elif options.max_tokens is not None and len(self.token_ids) >= options.max_tokens:
                text += self._end("length")
        self._text.append(text)
        return Piece(self.index, text, token, logprob, self.finish_reason)

    def end(self, reason: FinishReason) -> Piece:
        """End the text here for a reason from outside, with what was held back."""
        text = self._end(reason)
        self._text.append(text)
        return Piece(self.index, text, finish_reason=self.finish_reason)

    def choice(self) -> Choice:
        """The finished choice."""
        logprobs = tuple(self._logprobs) if self._options.logprobs is not None else None
        reason = self.finish_reason or "cancelled"
        return Choice(self.index, "".join(self._text), reason, tuple(self.token_ids), logprobs, self._stop)

    def _forbidden(self) -> tuple[int, ...]:
        if len(self.token_ids) < self._options.min_tokens:
            return (*self._eos, *self._options.stop_tokens)
        return self._eos if self._options.ignore_eos else ()

    def _end(self, reason: FinishReason) -> str:
        text = self._stops.push(self._decoder.finish())
        if self._stops.found is not None:
            self._stop, reason = self._stops.found, "stop"
        else:
            text += self._stops.finish()
        self.finish_reason = reason
        return text
