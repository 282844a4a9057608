"""OnnxRuntimeSession: an ONNX decoder behind the interface of ``devices/base.py``.

Sequences of a batch run one after the other, each on a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.config import RopeConfig
from nybble.devices.base import BatchItem, Sequence
from nybble.devices.batch import check_batch
from nybble.devices.longrope import plan_run
from nybble.devices.onnxruntime.cache import Cache
from nybble.devices.onnxruntime.decoder import Decoder
from nybble.devices.onnxruntime.placement import Placement
from nybble.devices.onnxruntime.providers import Runs
from nybble.devices.token_sequence import TokenSequence
from nybble.errors import (
    Cancelled,
    DeviceError,
    OutOfMemoryError,
    UnsupportedError,
)
from nybble.formats.onnx.decoder_io import DecoderIO

MAX_ROWS = 512
"""Tokens of one run; logits of all of them come out, whichever are asked for."""
STEP_COST = 16
"""About how many tokens of a prompt a GPU computes while it decodes one."""


class OnnxRuntimeSequence(TokenSequence):
    """One sequence. Of ``tokens``, the first ``cached`` are in the cache; the others run again when used.

    ``lock`` is the session's. ``long``: the cache was computed for more than the model's switch length.
    """

    def __init__(self, owner: OnnxRuntimeSession, lock: RLock, cache: Cache) -> None:
        super().__init__()
        self.owner = owner
        self._lock = lock
        self._cache: Cache | None = cache
        self.cached = 0
        self.long = False

    @property
    def cache(self) -> Cache:
        """The cache.

        Raises:
            DeviceError: the sequence was closed.
        """
        if self._cache is None:
            raise DeviceError("the sequence was closed")
        return self._cache

    def fork(self) -> OnnxRuntimeSequence:
        """A copy; the cache is shared until one of the two writes."""
        with self._lock:
            other = OnnxRuntimeSequence(self.owner, self._lock, self.cache.share())
            other._tokens = list(self._tokens)
            other.cached, other.long = self.cached, self.long
            self.owner.add(other)
            return other

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens.

        Raises:
            ValueError: ``length`` is negative or more than the sequence holds.
        """
        self.check_length(length)
        with self._lock:
            _ = self.cache
            del self._tokens[length:]
            self.cached = min(self.cached, length)

    def close(self) -> None:
        """Free the cache."""
        with self._lock:
            if self._cache is not None:
                self._cache.release()
                self._cache = None
                self.owner.remove(self)
            self._tokens, self.cached = [], 0

    def commit(self, tokens: Items[int], cache: Cache, long: bool) -> None:
        """Take over the state after a run."""
        if cache is not self._cache and self._cache is not None:
            self._cache.release()
        self._cache = cache
        self._tokens.extend(tokens)
        self.cached = len(self._tokens)
        self.long = long


@dataclass
class _Part:
    """What one item of a batch runs: ``tokens`` at ``start`` and on; the first ``silent`` of them are old."""

    sequence: OnnxRuntimeSequence
    item: BatchItem
    tokens: npt.NDArray[np.int64]
    start: int
    silent: int
    long: bool
    cache: Cache | None = None
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)


class OnnxRuntimeSession:
    """A model in ONNX Runtime.

    ``provider`` is nybble's name of the execution provider, ``reason`` why it was chosen, ``placement``
    where the nodes run. ``kv_cache_limit``: bytes that all caches together may take. ``runs`` and
    ``pads_masks``: see ``providers.Provider``.
    """

    def __init__(
        self,
        runtime: Any,
        decoder: Decoder,
        io: DecoderIO,
        *,
        context_length: int,
        threads: int,
        provider: str,
        reason: str,
        placement: Placement,
        kv_cache_limit: int | None,
        runs: Runs = "any",
        pads_masks: bool = False,
    ) -> None:
        self._lock = RLock()
        self._runtime = runtime
        self._decoder: Decoder | None = decoder
        self._io = io
        self._context_length = context_length
        self._limit = kv_cache_limit
        self.runs = runs
        self._sequences: dict[int, OnnxRuntimeSequence] = {}
        self._options: Any = None
        self._running: Any = None
        self._cancelled = False
        self.threads = threads
        self.provider = provider
        self.reason = reason
        self.placement = placement
        self._switch = 0 if io.switch is None else io.switch.length
        # The graph chooses its rotary tables by the length of the run at hand, mask included: a longer
        # mask, or where that is not to be had the whole sequence in one run, makes it take the long ones.
        self._pads_masks = pads_masks and io.switch is not None and io.switch.by_mask_size
        self._longrope = (
            None
            if io.switch is None
            else RopeConfig(
                theta=0.0, rotary_dim=2, kind="longrope", original_max_position_embeddings=self._switch
            )
        )

    @property
    def decoder(self) -> Decoder:
        """What runs the model.

        Raises:
            DeviceError: the session was closed.
        """
        if self._decoder is None:
            raise DeviceError("the session was closed")
        return self._decoder

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self._io.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens that one sequence may hold."""
        return self._context_length

    def new_sequence(self, adapters: Items[float] = ()) -> OnnxRuntimeSequence:
        """An empty sequence; weights of adapters are refused."""
        if adapters:
            raise DeviceError("the device onnxruntime runs no LoRA adapters; merge them with nybble convert")
        with self._lock:
            sequence = OnnxRuntimeSequence(self, self._lock, self.decoder.caches.empty())
            self.add(sequence)
            return sequence

    def add(self, sequence: OnnxRuntimeSequence) -> None:
        """Count a sequence's cache."""
        self._sequences[id(sequence)] = sequence

    def remove(self, sequence: OnnxRuntimeSequence) -> None:
        """Count it no more."""
        self._sequences.pop(id(sequence), None)

    def forward(self, batch: Items[BatchItem]) -> npt.NDArray[np.float32]:
        """Run new tokens of any number of sequences; see ``devices/base.py``."""
        with self._lock:
            decoder = self.decoder
            self._check(batch)
            parts = [self._plan(item) for item in batch]
            self._check_memory(parts)
            if self._options is None or self._cancelled:
                self._options = self._runtime.RunOptions()
                # No captured graphs; where this is not said, looking for it costs an exception a run.
                self._options.add_run_config_entry("gpu_graph_id", "-1")
            options = self._options
            self._cancelled = False
            self._running = options
            try:
                for part in parts:
                    self._run(decoder, part, options)
            except Exception as error:
                if self._cancelled:
                    raise Cancelled("the computation was cancelled") from None
                raise _explained(error) from error
            finally:
                self._running = None
            for part in parts:
                if part.cache is not None:
                    part.sequence.commit(part.item.tokens, part.cache, part.long)
            rows = [row for part in parts for row in part.logits]
            if len(rows) == 1:
                return rows[0]
            return np.concatenate(rows) if rows else np.empty((0, self.vocab_size), np.float32)

    def _check(self, batch: Items[BatchItem]) -> None:
        def owned(sequence: Sequence) -> None:
            own = _own(sequence)
            _ = own.cache
            if own.owner is not self:
                raise DeviceError("the sequence belongs to another session")

        check_batch(batch, owned=owned, vocab_size=self._io.vocab_size, context_length=self._context_length)

    def _plan(self, item: BatchItem) -> _Part:
        sequence = _own(item.sequence)
        held = sequence.held
        run = plan_run(self._longrope, held, sequence.long, item.tokens)
        start = 0 if run.repeated else sequence.cache.kept(sequence.cached)
        new = len(held) - start + len(item.tokens)
        if self.runs == "whole or one" and new > 1 and start + new < STEP_COST * new:
            start = 0
        tokens = np.array([*held[start:], *item.tokens], np.int64)
        return _Part(sequence, item, tokens, start, len(held) - start, run.long)

    def _check_memory(self, parts: Items[_Part]) -> None:
        if self._limit is None:
            return
        growing = {id(part.sequence): part for part in parts if len(part.item.tokens)}
        others = {id(s.cache): s.cache.nbytes for key, s in self._sequences.items() if key not in growing}
        needed = sum(others.values()) + sum(
            part.sequence.cache.nbytes_with(part.start + len(part.tokens)) for part in growing.values()
        )
        if needed > self._limit:
            raise OutOfMemoryError(
                f"caches of {needed} bytes would exceed kv_cache_limit of {self._limit};"
                " close sequences, shorten them or raise kv_cache_limit"
            )

    def _run(self, decoder: Decoder, part: _Part, options: Any) -> None:
        """Run one item in pieces; its sequence is changed by ``commit`` only."""
        if not len(part.item.tokens):
            return
        part.sequence.cached = min(part.sequence.cached, part.start)  # what follows may be overwritten
        at, total = 0, len(part.tokens)
        cache = part.sequence.cache.prepare(part.start, part.start + total)
        wants_all = part.item.logits == "all"
        while at < total:
            if self._cancelled:
                raise Cancelled("the computation was cancelled")
            end = self._end_of_piece(part, at)
            rows = "none"
            if wants_all and end > part.silent:
                rows = "all"
            elif part.item.logits == "last" and end == total:
                rows = "last"
            mask = self._switch + 1 if part.long and self._pads_masks else 0
            cache, logits = decoder.run(
                cache, part.tokens[at:end], part.start + at, rows=rows, mask_length=mask, options=options
            )
            if logits is not None:
                asked = end - max(part.silent, at) if rows == "all" else 1
                part.logits.append(logits[-asked:])
            at = end
        part.cache = cache

    def _end_of_piece(self, part: _Part, at: int) -> int:
        """Where the run that begins at token ``at`` ends."""
        total = len(part.tokens)
        position = part.start + at
        one_run = self.runs == "whole or one" and not position
        if part.long and position <= self._switch and not self._pads_masks:
            if self.runs == "one":
                raise UnsupportedError(
                    f"{self.provider} computes token by token here, but a sequence of more than"
                    f" {self._switch} tokens must run at once when this model's LongRoPE switches"
                )
            one_run = True
        if part.item.logits == "all" and self._io.last_row_only:
            if one_run and part.silent + 1 < total:
                raise UnsupportedError(
                    "this model gives the last row of logits alone and must compute the whole prompt at once:"
                    " logits of every token cannot be had"
                )
            if not one_run:
                return part.silent if at < part.silent else at + 1
        if one_run:
            return total
        return min(at + MAX_ROWS, total) if self.runs == "any" else at + 1

    def cancel(self) -> None:
        """Make a running ``forward`` in another thread raise Cancelled soon."""
        options = self._running
        if options is not None:
            self._cancelled = True
            options.terminate = True

    def close(self) -> None:
        """Release the model; sequences of this session become useless."""
        self._decoder = None
        self._sequences.clear()


def _own(sequence: Sequence) -> OnnxRuntimeSequence:
    if not isinstance(sequence, OnnxRuntimeSequence):
        raise TypeError(f"an ONNX Runtime session runs its own sequences, not {type(sequence).__name__}")
    return sequence


def _explained(error: Exception) -> Exception:
    """ONNX Runtime's errors as nybble's; others as they are."""
    if type(error).__module__.startswith("onnxruntime"):
        return DeviceError(f"ONNX Runtime failed: {str(error)[:500]}")
    return error
