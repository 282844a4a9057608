"""Runner: the one door to a session, for generations of several threads at once.

Every forward call takes the lock for itself, so generations take turns token by token and an open
stream never blocks another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from nybble.devices.base import BatchItem, Sequence, Session
from nybble.errors import Cancelled, ContextLengthError, NybbleError, OutOfMemoryError
from nybble.generate.prefix_cache import Prefix, PrefixCache


class Job:
    """What identifies one running computation and can cancel it."""

    def __init__(self) -> None:
        self.cancelled = False


class Runner:
    """Runs batches on a session.

    ``prefill_chunk``: prompt tokens a forward call, so that cancelling and other generations need
    not wait for a whole prompt. ``cached_sequences``: finished sequences kept for prefix reuse.
    """

    def __init__(self, session: Session, *, prefill_chunk: int = 512, cached_sequences: int = 1) -> None:
        self._session = session
        self._chunk = prefill_chunk
        self._cache = PrefixCache(cached_sequences)
        self._lock = threading.Lock()
        self._returned: deque[tuple[Prefix, bool]] = deque()
        self._running: Job | None = None
        self._jobs: set[Job] = set()
        self._closed = False

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self._session.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens that one sequence may hold."""
        return self._session.context_length

    def check(self, tokens: Items[int]) -> None:
        """Refuse a prompt that cannot run.

        Raises:
            ValueError: no token, or an id outside the vocabulary.
            ContextLengthError: longer than the context.
        """
        if not tokens:
            raise ValueError("the prompt has no tokens: pass some text")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            bad = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise ValueError(f"token id {bad} is not in the vocabulary of {self.vocab_size}")
        if len(tokens) > self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.context_length}: shorten "
                "the prompt, or load the model with a larger context_length if it was trained for one"
            )

    # -- jobs and cancelling ---------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        """Let ``cancel_all`` find this job."""
        self._jobs.add(job)

    def end(self, job: Job) -> None:
        """The job is over."""
        self._jobs.discard(job)

    def cancel(self, job: Job) -> None:
        """Stop this job soon: its current or next forward call raises Cancelled. From any thread."""
        job.cancelled = True
        if self._running is job:
            self._session.cancel()

    def cancel_all(self) -> None:
        """Stop every job that has begun."""
        for job in tuple(self._jobs):
            self.cancel(job)

    # -- computing -------------------------------------------------------------------------------

    def forward(self, job: Job, batch: Items[BatchItem]) -> npt.NDArray[np.float32]:
        """``Session.forward`` when it is this job's turn.

        Raises:
            Cancelled: the job was cancelled.
            OutOfMemoryError: the KV cache is full although all cached prefixes were freed.
        """
        while True:
            with self._lock:
                self._tidy()
                if job.cancelled:
                    raise Cancelled("the generation was cancelled")
                if self._closed:
                    raise NybbleError("the model is closed")
                self._running = job
                try:
                    return self._session.forward(batch)
                except Cancelled:
                    if job.cancelled:
                        raise
                    # It was meant for the job before: the sequences are unchanged, so run again.
                except OutOfMemoryError:
                    if not self._cache.clear():
                        raise
                finally:
                    self._running = None

    def start(
        self, job: Job, tokens: Items[int], *, reuse: bool, adapters: tuple[float, ...] = ()
    ) -> tuple[Prefix, int]:
        """A sequence that holds the prompt, with the logits after it, and how many tokens were cached.

        ``adapters``: the weight of each of the model's LoRA adapters.

        Raises:
            Cancelled, OutOfMemoryError: as ``forward``; the sequence was freed.
        """
        prefix = self._open(tokens if reuse else (), adapters)
        cached = prefix.sequence.length
        if prefix.logits is not None:
            return prefix, cached
        try:
            for start in range(cached, len(tokens), self._chunk):
                end = min(start + self._chunk, len(tokens))
                rows = "last" if end == len(tokens) else "none"
                logits = self.forward(job, [BatchItem(prefix.sequence, list(tokens[start:end]), rows)])
        except BaseException:
            self.release(prefix, keep=False)
            raise
        return Prefix(prefix.sequence, len(tokens), logits[-1].copy(), adapters), cached

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same content."""
        with self._lock:
            self._tidy()
            return sequence.fork()

    def logits(self, tokens: Items[int], adapters: tuple[float, ...] = ()) -> npt.NDArray[np.float32]:
        """Logits after every token: (len(tokens), vocab_size)."""
        self.check(tokens)
        job = Job()
        result = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        prefix = self._open((), adapters)
        self.begin(job)
        try:
            for start in range(0, len(tokens), self._chunk):
                part = list(tokens[start : start + self._chunk])
                result[start : start + len(part)] = self.forward(
                    job, [BatchItem(prefix.sequence, part, "all")]
                )
        finally:
            self.end(job)
            self.release(prefix, keep=False)
        return result

    def release(self, prefix: Prefix, *, keep: bool) -> None:
        """Give a sequence back: to the prefix cache, or to be freed.

        Never waits, because a garbage collection may call it at any moment, even in the thread that
        holds the lock; what cannot be done now is done before the next computation.
        """
        self._returned.append((prefix, keep))
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def clear_cache(self) -> None:
        """Forget all cached prefixes."""
        with self._lock:
            self._tidy()
            self._cache.clear()

    def close(self) -> None:
        """Cancel everything and free the session. Calling it again does nothing."""
        self.cancel_all()
        with self._lock:
            if self._closed:
                return
            self._tidy()
            self._cache.clear()
            self._closed = True
            self._session.close()

    def _open(self, tokens: Items[int], adapters: tuple[float, ...]) -> Prefix:
        with self._lock:
            self._tidy()
            if self._closed:
                raise NybbleError("the model is closed")
            found = self._cache.take(tokens, adapters)
            if found is not None:
                return found
            new = self._session.new_sequence
            return Prefix(new(adapters) if adapters else new(), adapters=adapters)

    def _tidy(self) -> None:
        """Do what ``release`` put off; the lock is held."""
        while self._returned:
            prefix, keep = self._returned.popleft()
            if self._closed:
                continue  # the session has freed its sequences
            if keep:
                self._cache.put(prefix)
            else:
                prefix.sequence.close()
