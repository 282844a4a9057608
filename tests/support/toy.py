"""A toy language model in NumPy: a Session whose logits depend on all tokens of the sequence.

Deterministic and quick, and it counts what it is asked to do. It behaves as Session promises.
"""

from __future__ import annotations

import threading

import numpy as np

from nybble.errors import Cancelled, ContextLengthError, OutOfMemoryError


class ToySequence:
    def __init__(self, session, tokens=()):
        self._session = session
        self._tokens = list(tokens)
        self.closed = False
        session.open_sequences += 1

    @property
    def length(self):
        return len(self._tokens)

    @property
    def tokens(self):
        return list(self._tokens)

    def fork(self):
        assert not self.closed
        return ToySequence(self._session, self._tokens)

    def truncate(self, length):
        assert not self.closed
        assert 0 <= length <= len(self._tokens)
        del self._tokens[length:]

    def close(self):
        assert not self.closed, "a sequence was closed twice"
        self.closed = True
        self._session.open_sequences -= 1


class ToySession:
    """``script``: tokens to prefer after the prompt's end, whatever the prompt; None: by hash."""

    def __init__(self, vocab_size=64, context_length=64, sharpness=1.0):
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.sharpness = sharpness
        self.calls = []
        """The numbers of new tokens of each forward call, a tuple a call."""
        self.open_sequences = 0
        self.before_forward = None
        self.memory_tokens = None
        self.closed = False
        self._cancel = threading.Event()
        self._inside = threading.Lock()

    def new_sequence(self):
        assert not self.closed
        return ToySequence(self)

    def row(self, tokens):
        """Logits (vocab_size,) after these tokens; a pure function of them."""
        state = 7
        for token in tokens:
            state = (state * 1_000_003 + token + 1) % (2**61 - 1)
        return np.random.default_rng(state).normal(0, self.sharpness, self.vocab_size).astype(np.float32)

    def forward(self, batch):
        assert not self.closed
        assert self._inside.acquire(blocking=False), "forward was called by two threads at a time"
        try:
            self._cancel.clear()
            for item in batch:
                assert not item.sequence.closed
                assert len(item.tokens) > 0
                if item.sequence.length + len(item.tokens) > self.context_length:
                    raise ContextLengthError("too long")
            if self.memory_tokens is not None and self.open_sequences > self.memory_tokens:
                raise OutOfMemoryError("too many sequences")
            if self.before_forward is not None:
                self.before_forward(self)
            if self._cancel.is_set():
                raise Cancelled("cancelled")
            self.calls.append(tuple(len(item.tokens) for item in batch))
            rows = []
            for item in batch:
                for place, token in enumerate(item.tokens):
                    item.sequence._tokens.append(token)
                    last = place == len(item.tokens) - 1
                    if item.logits == "all" or (item.logits == "last" and last):
                        rows.append(self.row(item.sequence._tokens))
            return np.array(rows, dtype=np.float32).reshape(len(rows), self.vocab_size)
        finally:
            self._inside.release()

    def wait_for_cancel(self, seconds=10.0):
        """Stand for a long computation that looks for a cancel."""
        assert self._cancel.wait(seconds), "nobody cancelled"

    def cancel(self):
        self._cancel.set()

    def close(self):
        self.closed = True


class ToyDecoder:
    """Bytes of UTF-8: token t is byte t % 256; gives whole characters only."""

    def __init__(self):
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        return self._decoder.decode(bytes([token % 256]))

    def finish(self):
        return self._decoder.decode(b"", final=True)
