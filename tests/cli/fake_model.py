"""A model that answers from a list of pieces, with the streaming interface of the real one."""

from __future__ import annotations

import threading

from nybble.generate.options import GenerationOptions
from nybble.generate.reply import Choice, Reply, Timings, Usage


class FakeStream:
    """Streams the pieces; each but the first takes ``seconds``."""

    def __init__(self, pieces, options, seconds=0.0, failure=None):
        self._pieces = iter(pieces)
        self._said = []
        self._options = options
        self._seconds = seconds
        self._failure = failure
        self._cancelled = threading.Event()
        self._reason = "stop"

    def __iter__(self):
        return self

    def __next__(self):
        if self._said:
            self._cancelled.wait(self._seconds)
        if self._cancelled.is_set():
            self._reason = "cancelled"
            raise StopIteration
        if self._options.max_tokens is not None and len(self._said) >= self._options.max_tokens:
            self._reason = "length"
            raise StopIteration
        try:
            piece = next(self._pieces)
        except StopIteration:
            if self._failure is not None:
                raise self._failure from None
            raise
        self._said.append(piece)
        return piece

    def cancel(self):
        self._cancelled.set()

    def close(self):
        pass

    @property
    def reply(self):
        choices = tuple(
            Choice(index, "".join(self._said), self._reason, tuple(range(len(self._said))))
            for index in range(self._options.n)
        )
        return Reply(choices, Usage(7, len(self._said)), Timings(0.5, 0.25, 0.5, 7, len(self._said)), seed=42)


class FakeModel:
    """Records what it was asked."""

    def __init__(self, pieces=("Hello", ", ", "world"), seconds=0.0, failure=None):
        self.pieces = pieces
        self.seconds = seconds
        self.failure = failure
        self.asked = []
        self.checkpoint = None
        self.loaded = []

    def load(self, source, **options):
        self.loaded.append((source, options))
        return self

    def _stream(self, kind, what, options):
        self.asked.append((kind, what, options))
        checked = GenerationOptions().updated(options)
        return FakeStream(self.pieces, checked, self.seconds, self.failure)

    def stream(self, prompt, **options):
        return self._stream("raw", prompt, options)

    def stream_chat(self, messages, **options):
        return self._stream("chat", [dict(message) for message in messages], options)
