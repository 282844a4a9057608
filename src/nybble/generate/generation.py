"""Generation: the loop from a prompt's tokens to finished choices, and the stream of its text.

Nothing is computed before it is asked for: each ``next`` runs one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType

import numpy as np
import numpy.typing as npt

from nybble.devices.base import BatchItem
from nybble.errors import Cancelled, NybbleError
from nybble.generate.options import GenerationOptions
from nybble.generate.prefix_cache import Prefix
from nybble.generate.reply import Piece, Reply, Timings, Usage
from nybble.generate.runner import Job, Runner
from nybble.generate.sampler import Sampler
from nybble.generate.writer import TextDecoder, Writer


class Generation(Iterator[Piece]):
    """An iterator over pieces of text and tokens; ``reply`` holds the whole once it has ended.

    Closing it, leaving its ``with`` block or dropping it frees its cache and computes no more.
    ``decoder`` makes an incremental decoder for each choice, ``end_tokens`` end an answer,
    ``breakers`` are DRY's sequence breakers. ``vocab_size``: tokens that the tokenizer knows; logits
    beyond it pad the matrix and are never drawn. ``adapters``: the weight of each LoRA adapter.

    Raises:
        ValueError: the prompt is empty or holds a token id outside the vocabulary.
        ContextLengthError: the prompt does not fit the context.
    """

    def __init__(
        self,
        runner: Runner,
        prompt: Sequence[int],
        options: GenerationOptions,
        *,
        decoder: Callable[[], TextDecoder],
        end_tokens: Collection[int] = (),
        breakers: Sequence[int] = (),
        vocab_size: int | None = None,
        load_seconds: float = 0.0,
        adapters: tuple[float, ...] = (),
    ) -> None:
        runner.check(prompt)
        known = runner.vocab_size if vocab_size is None else min(vocab_size, runner.vocab_size)
        for token in options.stop_tokens:
            if not 0 <= token < known:
                raise ValueError(f"stop_tokens: token id {token} is not in the vocabulary of {known}")
        seed = int.from_bytes(os.urandom(7), "little") if options.seed is None else options.seed
        writers = [
            Writer(
                index,
                options,
                Sampler(
                    options,
                    vocab_size=known,
                    history=prompt,
                    seed=seed,
                    index=index,
                    breakers=breakers,
                ),
                _after(decoder(), prompt[-1]) if prompt[-1] < known else decoder(),
                [token for token in end_tokens if token < known],
            )
            for index in range(options.n)
        ]
        self._state = _State(runner, tuple(prompt), options, writers, seed, load_seconds, adapters)
        # The generator must not hold this object, or dropping it would not end the generator.
        self._steps = _steps(self._state)

    def __next__(self) -> Piece:
        return next(self._steps)

    @property
    def reply(self) -> Reply:
        """Everything that was generated.

        Raises:
            NybbleError: it still runs; read it to the end or close it first.
        """
        if not self._state.ended:
            raise NybbleError("the generation still runs: read it to its end or close it first")
        return self._state.reply()

    def run(self) -> Reply:
        """Compute the rest and return the reply."""
        for _ in self:
            pass
        return self.reply

    def cancel(self) -> None:
        """From another thread: make the running step end soon, with finish reason ``cancelled``."""
        self._state.runner.cancel(self._state.job)

    def close(self) -> None:
        """Stop; what was generated so far stays in ``reply``. Calling it again does nothing."""
        if self._state.ended:
            return
        try:
            self._steps.close()
            self._state.ended = True
        except ValueError:  # another thread is computing: it frees everything when it stops
            self.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_steps"):
            self.close()


class Stream(Iterator[str]):
    """The text of a generation, piece by piece; ``reply`` once it has ended."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    def __next__(self) -> str:
        while True:
            piece = next(self.generation)
            if piece.text:
                return piece.text

    @property
    def reply(self) -> Reply:
        """See ``Generation.reply``."""
        return self.generation.reply

    def cancel(self) -> None:
        """See ``Generation.cancel``."""
        self.generation.cancel()

    def close(self) -> None:
        """See ``Generation.close``."""
        self.generation.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class _State:
    runner: Runner
    prompt: tuple[int, ...]
    options: GenerationOptions
    writers: list[Writer]
    seed: int
    load_seconds: float
    adapters: tuple[float, ...] = ()
    job: Job = field(default_factory=Job)
    cached: int = 0
    computed: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ended: bool = False

    def reply(self) -> Reply:
        choices = tuple(writer.choice() for writer in self.writers)
        generated = sum(len(choice.token_ids) for choice in choices)
        return Reply(
            choices,
            Usage(len(self.prompt), generated, self.cached),
            Timings(self.load_seconds, self.prefill_seconds, self.decode_seconds, self.computed, generated),
            self.seed,
        )


def _steps(state: _State) -> Generator[Piece, None, None]:
    """The pieces of all choices; frees the sequences however it ends."""
    runner, job = state.runner, state.job
    reuse = bool(state.options.reuse_prefix)
    prefix: Prefix | None = None
    keep = False
    runner.begin(job)
    try:
        started = perf_counter()
        with suppress(Cancelled):
            prefix, state.cached = runner.start(job, state.prompt, reuse=reuse, adapters=state.adapters)
            state.computed = len(state.prompt) - state.cached
        state.prefill_seconds = perf_counter() - started
        if prefix is None:
            yield from [writer.end("cancelled") for writer in state.writers]
            return
        for writer in state.writers:
            writer.sequence = prefix.sequence if writer.index == 0 else runner.fork(prefix.sequence)
        assert prefix.logits is not None
        yield from _decode(state, prefix.logits)
        keep = reuse
    except GeneratorExit:
        keep = reuse
        raise
    finally:
        for writer in state.writers:
            _free(state, writer)
        if prefix is not None:
            runner.release(prefix, keep=keep)
        runner.end(job)
        state.ended = True


def _decode(state: _State, logits: npt.NDArray[np.float32]) -> Iterator[Piece]:
    """From the logits after the prompt to the end of every choice."""
    runner = state.runner
    active = state.writers
    rows: Sequence[npt.NDArray[np.float32]] | npt.NDArray[np.float32] = [logits] * len(active)
    while True:
        for writer, row in zip(active, rows, strict=True):
            started = perf_counter()
            piece = writer.step(row)
            state.decode_seconds += perf_counter() - started
            yield piece
        for writer in active:
            sequence = writer.sequence
            if writer.finish_reason is None and sequence is not None:
                if sequence.length < runner.context_length:
                    continue
                yield writer.end("context")
            _free(state, writer)
        active = [writer for writer in active if writer.finish_reason is None]
        if not active:
            return
        started = perf_counter()
        cancelled = False
        try:
            rows = runner.forward(state.job, [_next(writer) for writer in active])
        except Cancelled:
            cancelled = True
        state.decode_seconds += perf_counter() - started
        if cancelled:
            yield from [writer.end("cancelled") for writer in active]
            return


def _after(decoder: TextDecoder, token: int) -> TextDecoder:
    """The decoder after a prompt's last token: a space that begins the answer is text, not a start."""
    decoder.add(token)
    return decoder


def _next(writer: Writer) -> BatchItem:
    assert writer.sequence is not None
    return BatchItem(writer.sequence, writer.token_ids[-1:])


def _free(state: _State, writer: Writer) -> None:
    """Free a forked sequence; the first choice's belongs to the prefix."""
    if writer.index > 0 and writer.sequence is not None:
        state.runner.release(Prefix(writer.sequence), keep=False)
    writer.sequence = None
