"""A toy language model in NumPy: a Session whose logits depend on all tokens of the sequence.

Deterministic and quick, and it counts what it is asked to do. It behaves as Session promises.
"""

from __future__ import annotations

import threading

import numpy as np

from nybble.errors import Cancelled, ContextLengthError, OutOfMemoryError
from nybble.text.special import SpecialTokenSplitter
from nybble.text.tokenizer import SpecialIds, Tokenizer
from nybble.text.vocabulary import TokenType, Vocabulary


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
    def __init__(self, vocab_size=64, context_length=64, sharpness=1.0):
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.sharpness = sharpness
        self.calls = []
        """The numbers of new tokens of each forward call, a tuple a call."""
        self.open_sequences = 0
        self.before_forward = None
        self.most_sequences = None
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
            if self.most_sequences is not None and self.open_sequences > self.most_sequences:
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


# -- text -----------------------------------------------------------------------------------------

CONTROL = ("<bos>", "<end>", "<user>", "<bot>", "<system>")
BOS, END, USER, BOT, SYSTEM = range(256, 261)
TEXT_VOCAB = 261


class _ByteEncoder:
    def __init__(self):
        self._splitter = SpecialTokenSplitter([(name, 256 + i) for i, name in enumerate(CONTROL)])

    def encode(self, text, *, parse_special):
        parts = self._splitter.split(text) if parse_special else [text]
        ids = []
        for part in parts:
            ids += [part] if isinstance(part, int) else part.encode("utf-8")
        return ids


def toy_tokenizer(space_prefix=False):
    """Tokens 0 to 255 are bytes, then come the control tokens."""
    texts = [f"<0x{byte:02X}>" for byte in range(256)] + list(CONTROL)
    types = np.array([TokenType.BYTE] * 256 + [TokenType.CONTROL] * len(CONTROL), dtype=np.uint8)
    special = SpecialIds(bos=BOS, eos=frozenset({END}), main_eos=END)
    return Tokenizer(
        Vocabulary(texts, types, "sentencepiece"),
        _ByteEncoder(),
        special,
        prefix=[BOS],
        space_prefix=space_prefix,
    )


def toy_template(messages, tools=None):
    text = "".join(f"<{m['role']}>{m['content']}<end>".replace("<assistant>", "<bot>") for m in messages)
    return (f"{len(tools)} tools" if tools else "") + text + "<bot>"


class ScriptSession(ToySession):
    """Prefers the text that ``answer(tokens)`` returns as token ids, then the end token."""

    def __init__(self, answer, context_length=4096):
        super().__init__(TEXT_VOCAB, context_length)
        self.answer = answer

    def row(self, tokens):
        start = max((i for i, t in enumerate(tokens) if t in (BOT, BOS)), default=-1) + 1
        script = [*self.answer(tokens[:start]), END]
        row = np.zeros(TEXT_VOCAB, dtype=np.float32)
        row[script[min(len(tokens) - start, len(script) - 1)]] = 30.0
        return row
