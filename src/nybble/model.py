"""Model: a checkpoint that is ready to run, with text in and text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.devices.base import Session
from nybble.errors import UnsupportedError
from nybble.generate.dry import breaker_tokens
from nybble.generate.generation import Generation, Stream
from nybble.generate.options import GenerationOptions
from nybble.generate.prompt import Message, Render, encode_chat, encode_text
from nybble.generate.reply import Reply
from nybble.generate.runner import Runner
from nybble.text.chat import ChatTemplate

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.checkpoint.config import ModelConfig
    from nybble.text.tokenizer import Tokenizer

__all__ = ["Generation", "GenerationOptions", "Message", "Model", "Reply", "Stream"]

RAW_MAX_TOKENS = 256
"""``max_tokens`` of raw text where the caller names none: such text may never end by itself."""


class Model:
    """What ``nybble.load`` returns. Use it from any number of threads; each computation takes turns.

    ``defaults`` are the generation options that hold unless a call names others: nybble's own, or
    what the model's file recommends. Every ``**options`` below is a field of ``GenerationOptions``.
    Closing the model, or leaving its ``with`` block, frees its memory.

    Raises (all generating methods):
        TypeError, ValueError: an option is unknown or out of range; the prompt is empty.
        ContextLengthError: the prompt does not fit the context.
        UnsupportedError: the checkpoint has no tokenizer and text was given.
    """

    def __init__(
        self,
        session: Session,
        *,
        checkpoint: Checkpoint | None = None,
        tokenizer: Tokenizer | None = None,
        render: Render | None = None,
        defaults: GenerationOptions | None = None,
        load_seconds: float = 0.0,
        prefill_chunk: int = 512,
        cached_sequences: int = 1,
    ) -> None:
        self.checkpoint = checkpoint
        self.defaults = defaults or GenerationOptions()
        self.load_seconds = load_seconds
        self.session = session
        """The device's session. Do not call ``forward`` on it while something is generated."""
        self._tokenizer = tokenizer
        self._render = render
        self._breaker_ids: dict[tuple[str, ...], Sequence[int]] = {}
        self._runner = Runner(session, prefill_chunk=prefill_chunk, cached_sequences=cached_sequences)

    # -- text ------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Continue a text; returns what follows it."""
        return self.complete(prompt, **options).text

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Stream:
        """Continue a text piece by piece: an iterator of strings, with ``reply`` at its end.

        Each step is computed when the next piece is asked for. Closing or dropping the iterator
        stops the computation. With ``n`` > 1 it yields the first choice's text.
        """
        return Stream(self.start(prompt, **options))

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Reply:
        """Continue a text, or tokens as they are, and return everything about it."""
        return self.start(prompt, **options).run()

    def start(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a text: an iterator over pieces of all choices with tokens and log-probabilities."""
        options = {"max_tokens": self.defaults.max_tokens or RAW_MAX_TOKENS, **options}
        if isinstance(prompt, str):
            tokens = encode_text(self.tokenizer, prompt)
        else:
            tokens = [int(token) for token in prompt]
        return self._generation(tokens, self.defaults.updated(options))

    # -- chat ------------------------------------------------------------------------------------

    def chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Reply:
        """Answer the last of ``messages``, each a mapping with ``role`` and ``content``.

        A conversation that goes on reuses the computed tokens of the one before, as far as both
        begin with the same tokens; ``reply.usage.cached_tokens`` tells how many.

        Raises:
            TemplateError: the model has no chat template, or it refuses the messages.
        """
        return self.start_chat(messages, tools, **options).run()

    def stream_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Stream:
        """``chat`` piece by piece, as ``stream`` does."""
        return Stream(self.start_chat(messages, tools, **options))

    def start_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Generation:
        """``chat`` as an iterator over pieces, as ``start`` does."""
        chosen = self.defaults.updated(options)
        if chosen.reuse_prefix is None:
            chosen = chosen.updated({"reuse_prefix": True})
        tokens = self.encode_chat(messages, tools, trust_content=chosen.trust_content)
        return self._generation(tokens, chosen)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        trust_content: bool = False,
    ) -> list[int]:
        """The tokens of a chat prompt; see ``GenerationOptions.trust_content``."""
        if self._render is None:
            raise ChatTemplate.missing(self.checkpoint.name if self.checkpoint else "this model")
        return encode_chat(self.tokenizer, self._render, messages, tools, trust_content=trust_content)

    # -- numbers ---------------------------------------------------------------------------------

    def logits(
        self, tokens: Sequence[int], *, adapters: Mapping[str, float] | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits after each token: float32 (len(tokens), vocab_size).

        ``adapters`` as ``GenerationOptions.adapters``.
        """
        chosen = self.defaults if adapters is None else self.defaults.updated({"adapters": adapters})
        return self._runner.logits([int(token) for token in tokens], self._adapter_weights(chosen))

    # -- what it is ------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """``encode(text)`` and ``decode(tokens)``."""
        if self._tokenizer is None:
            raise UnsupportedError("this checkpoint has no tokenizer: pass token ids instead of text")
        return self._tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's hyperparameters."""
        if self.checkpoint is None:
            raise UnsupportedError("this model was made without a checkpoint and has no config")
        return self.checkpoint.config

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that the model was loaded with."""
        return () if self.checkpoint is None else self.checkpoint.adapters

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._runner.context_length

    # -- control ---------------------------------------------------------------------------------

    def cancel(self) -> None:
        """From another thread: end everything that is being generated, finish reason ``cancelled``."""
        self._runner.cancel_all()

    def forget(self) -> None:
        """Free the cached tokens of earlier conversations."""
        self._runner.clear_cache()

    def close(self) -> None:
        """Cancel what runs and free the memory. Calling it again does nothing."""
        self._runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = self.checkpoint.name if self.checkpoint is not None else ""
        return f"<nybble.Model {name or '(unnamed)'}, context of {self.context_length} tokens>"

    # -- internals -------------------------------------------------------------------------------

    def _generation(self, tokens: Sequence[int], options: GenerationOptions) -> Generation:
        tokenizer = self._tokenizer
        return Generation(
            self._runner,
            tokens,
            options,
            decoder=_NoText if tokenizer is None else tokenizer.decoder,
            end_tokens=() if tokenizer is None else tokenizer.eos_ids,
            vocab_size=None if tokenizer is None else tokenizer.vocab_size,
            breakers=self._breakers(options),
            load_seconds=self.load_seconds,
            adapters=self._adapter_weights(options),
        )

    def _adapter_weights(self, options: GenerationOptions) -> tuple[float, ...]:
        """The weight of each adapter in the order of ``adapters``; those that nobody names are off."""
        given = options.adapters or {}
        for name in given:
            if name not in self.adapters:
                known = f"it has {', '.join(self.adapters)}" if self.adapters else "it was loaded without any"
                raise ValueError(f"the model has no adapter {name!r}: {known}")
        return tuple(given.get(name, 0.0) for name in self.adapters)

    def _breakers(self, options: GenerationOptions) -> Sequence[int]:
        if options.dry_multiplier == 0 or not options.dry_sequence_breakers:
            return ()
        breakers = options.dry_sequence_breakers
        if breakers not in self._breaker_ids:
            tokenizer = self.tokenizer
            pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
            self._breaker_ids[breakers] = breaker_tokens(pieces, breakers)
        return self._breaker_ids[breakers]


class _NoText:
    """The decoder of a model without a tokenizer: tokens only."""

    def add(self, token_id: int, /) -> str:
        return ""

    def finish(self) -> str:
        return ""
