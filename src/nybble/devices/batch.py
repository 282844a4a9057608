"""What every device checks of a batch before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np

from nybble.devices.base import BatchItem, Sequence
from nybble.errors import ContextLengthError

LOGITS = ("none", "last", "all")
"""Values of ``BatchItem.logits``."""


def check_batch(
    batch: Items[BatchItem], *, owned: Callable[[Sequence], None], vocab_size: int, context_length: int
) -> None:
    """Refuse a batch that cannot run; ``owned`` raises for a sequence that is not the session's.

    Raises:
        ValueError: a sequence is there twice, a token id or ``logits`` is none, or there is no last row.
        ContextLengthError: a sequence would outgrow the context.
    """
    seen: set[int] = set()
    for item in batch:
        owned(item.sequence)
        if id(item.sequence) in seen:
            raise ValueError("a sequence may be in a batch only once")
        seen.add(id(item.sequence))
        if item.sequence.length + len(item.tokens) > context_length:
            raise ContextLengthError(
                f"a sequence of {item.sequence.length} tokens cannot take {len(item.tokens)} more: the "
                f"context length is {context_length}; load the model with a larger context_length or "
                "shorten it"
            )
        if item.logits not in LOGITS:
            raise ValueError(f"logits is 'none', 'last' or 'all', not {item.logits!r}")
        if item.logits == "last" and len(item.tokens) == 0:
            raise ValueError("no new tokens: there is no last row to return logits of")
        if not _are_ids(item.tokens, vocab_size):
            raise ValueError(f"token ids must be whole numbers in 0 .. {vocab_size - 1}")


def _are_ids(tokens: Items[int], vocab_size: int) -> bool:
    if len(tokens) == 1 and type(tokens[0]) is int:  # a step of decoding: without NumPy's overhead
        return 0 <= tokens[0] < vocab_size
    ids = np.asarray(tokens)
    return not ids.size or (ids.dtype.kind in "iu" and 0 <= ids.min() <= ids.max() < vocab_size)
