"""Device, Session and Sequence: what every device offers to generation, chat and evaluation."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Sequence(Protocol):
    """One token sequence and its KV cache inside a session."""

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache."""
        ...

    @property
    def tokens(self) -> list[int]:
        """The tokens that are in the cache."""
        ...

    def fork(self) -> Sequence:
        """A new sequence with the same content; cache pages are shared until one of them writes."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        ...

    def close(self) -> None:
        """Free the cache pages."""
        ...


@dataclass(frozen=True)
class BatchItem:
    """New tokens for one sequence.

    ``logits`` says which rows to return: ``"last"`` (after the last new token), ``"all"`` (after
    every new token) or ``"none"``.
    """

    sequence: Sequence
    tokens: Items[int]
    logits: str = "last"


class Session(Protocol):
    """A compiled model on a device. ``forward`` is called by one thread at a time."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Most tokens that one sequence may hold."""
        ...

    def new_sequence(self, adapters: Items[float] = ()) -> Sequence:
        """An empty sequence, with the weight of each of the checkpoint's LoRA adapters.

        None given: all are off. A fork has the same weights.

        Raises:
            ValueError: the number of weights is another than that of the adapters.
            DeviceError: weights are given and the device runs no adapters.
        """
        ...

    def forward(self, batch: Items[BatchItem]) -> npt.NDArray[np.float32]:
        """Run the new tokens; returns logits (rows asked for, vocab_size) in batch order.

        Raises:
            ContextLengthError: a sequence would outgrow ``context_length``; nothing was run.
            OutOfMemoryError: the KV cache's limit is reached; nothing was run.
            Cancelled: ``cancel`` was called; the sequences are as before the call.
        """
        ...

    def cancel(self) -> None:
        """Make a running ``forward`` (in another thread) raise Cancelled soon; else do nothing."""
        ...

    def close(self) -> None: ...


def adapter_weights(given: Items[float], count: int) -> tuple[float, ...]:
    """One weight for each of ``count`` adapters; none given: all 0."""
    if given and len(given) != count:
        raise ValueError(f"{len(given)} weights of adapters; the model has {count}")
    return tuple(float(weight) for weight in given) or (0.0,) * count
