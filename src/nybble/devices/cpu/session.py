"""CpuSession: the native session behind the interface of ``devices/base.py``.

What the native core leaves to Python: which tokens a sequence holds, running them again where the
cache cannot be cut back (sliding windows) or was rotated for another length (LongRoPE).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nybble import _core
from nybble.devices.base import BatchItem, Sequence, adapter_weights
from nybble.devices.batch import check_batch
from nybble.devices.longrope import plan_run
from nybble.devices.token_sequence import TokenSequence
from nybble.errors import Cancelled, DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    from nybble.checkpoint.config import RopeConfig

LOGIT_ROWS = {"none": 0, "last": 1, "all": 2}


class CpuSequence(TokenSequence):
    """One sequence. ``tokens`` is what it holds; the native cache may hold less, never other tokens.

    ``lock`` is the session's: changing a sequence from another thread waits for a running forward.
    """

    def __init__(self, native: _core.Sequence, lock: RLock, tokens: Items[int], long: bool) -> None:
        super().__init__(tokens)
        self._lock = lock
        self.native: _core.Sequence | None = native
        self.long = long

    @property
    def cache(self) -> _core.Sequence:
        """The native sequence.

        Raises:
            DeviceError: the sequence was closed.
        """
        if self.native is None:
            raise DeviceError("the sequence was closed")
        return self.native

    def fork(self) -> CpuSequence:
        """A copy that shares cache pages until one of the two writes."""
        with self._lock:
            return CpuSequence(self.cache.fork(), self._lock, self._tokens, self.long)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens.

        Raises:
            ValueError: ``length`` is negative or more than the sequence holds.
        """
        self.check_length(length)
        with self._lock:
            del self._tokens[length:]
            if self.cache.length > length and not self.cache.truncate(length):
                self.cache.clear()  # a sliding window dropped what is needed: run again when used

    def close(self) -> None:
        """Free the cache pages."""
        with self._lock:
            if self.native is not None:
                self.native.clear()
                self.native = None
            self._tokens = []

    def append(self, tokens: Items[int]) -> None:
        """Note tokens that were run."""
        self._tokens.extend(tokens)


class CpuSession:
    """A model compiled for this machine's CPU."""

    def __init__(
        self, native: _core.Session, *, vocab_size: int, context_length: int, longrope: RopeConfig | None,
        keep_alive: object, adapters: int = 0,
    ) -> None:  # fmt: skip
        # Re-entrant: the garbage collector may close a sequence while forward prepares a batch.
        self._lock = RLock()
        self._native: _core.Session | None = native
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._longrope = longrope
        self._adapters = adapters
        self._keep_alive = keep_alive

    @property
    def native(self) -> _core.Session:
        """The native session.

        Raises:
            DeviceError: the session was closed.
        """
        if self._native is None:
            raise DeviceError("the session was closed")
        return self._native

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self._vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens that one sequence may hold."""
        return self._context_length

    @property
    def threads(self) -> int:
        """Threads that compute, the calling one included."""
        return int(self.native.threads)

    def new_sequence(self, adapters: Items[float] = ()) -> CpuSequence:
        """An empty sequence; ``adapters`` as in ``devices/base.py``."""
        weights = adapter_weights(adapters, self._adapters)
        with self._lock:
            native = self.native.new_sequence()
            if any(weights):
                native.adapter_weights = list(weights)
            return CpuSequence(native, self._lock, [], False)

    def forward(self, batch: Items[BatchItem]) -> npt.NDArray[np.float32]:
        """Run new tokens of any number of sequences; see ``devices/base.py``."""
        with self._lock:
            keep_alive = self._keep_alive  # close() in another thread must not take the weights away
            try:
                return self._forward(self.native, batch)
            finally:
                del keep_alive

    def _forward(self, native: _core.Session, batch: Items[BatchItem]) -> npt.NDArray[np.float32]:
        repeated: list[tuple[_core.Sequence, npt.NDArray[np.int32], int, int]] = []
        main: list[tuple[_core.Sequence, npt.NDArray[np.int32], int, int]] = []
        after: list[tuple[CpuSequence, Items[int], bool]] = []
        rows = 0

        def owned(sequence: Sequence) -> None:
            if not native.owns(_own(sequence).cache):
                raise DeviceError("the sequence belongs to another session")

        check_batch(batch, owned=owned, vocab_size=self._vocab_size, context_length=self._context_length)
        for item in batch:
            sequence = _own(item.sequence)
            held = sequence.tokens
            run = plan_run(self._longrope, held, sequence.long, item.tokens)
            if run.start == 0 and run.repeated:
                sequence.cache.clear()
            missing = held[sequence.cache.length :]
            rope_set = int(run.long)
            if missing:
                repeated.append((sequence.cache, _ids(missing), 0, rope_set))
            main.append((sequence.cache, _ids(item.tokens), LOGIT_ROWS[item.logits], rope_set))
            after.append((sequence, item.tokens, run.long))
            if item.logits == "all":
                rows += len(item.tokens)
            elif item.logits == "last":
                rows += 1
        output = np.empty((rows, self._vocab_size), dtype=np.float32)
        try:
            if repeated:
                native.forward(repeated, np.empty((0, self._vocab_size), dtype=np.float32))
                for sequence, _, long in after:
                    sequence.long = long
            native.forward(main, output)
        except _core.CacheFull as error:
            raise OutOfMemoryError(
                f"{error}; close sequences, shorten them or raise kv_cache_limit"
            ) from None
        except _core.ForwardCancelled:
            raise Cancelled("the computation was cancelled") from None
        for sequence, tokens, long in after:
            sequence.append(tokens)
            sequence.long = long
        return output

    def cancel(self) -> None:
        """Make a running ``forward`` in another thread raise Cancelled soon."""
        if self._native is not None:
            self._native.cancel()

    def close(self) -> None:
        """Release threads, buffers and the mapped weights; sequences of this session become useless."""
        self._native = None
        self._keep_alive = None


def _own(sequence: Sequence) -> CpuSequence:
    if not isinstance(sequence, CpuSequence):
        raise TypeError(f"a CPU session runs its own sequences, not {type(sequence).__name__}")
    return sequence


def _ids(tokens: Items[int]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(tokens, dtype=np.int32).reshape(-1)
