"""One model behind a pipe: the process that ``process.Worker`` starts for each model.

A process a model makes its peak memory its own, and its end not that of the evaluation. Requests are
JSON objects, one a line, on standard input; each is answered with one on standard output, which logits
follow as raw float32. What libraries print goes to standard error. When the input ends, so does it.

==============  ============================================  ===========================
``do``          fields                                        answer
==============  ============================================  ===========================
``load``        ``path``, ``device``, ``options``,            facts about the model
                ``context_length`` (wanted)
``vocabulary``  ``ids``                                       ``pieces``: hex, or null
``split``       ``text``, ``count``                           ``digest`` of its ids
``time``        ``prefill``, ``decode``: tokens               seconds of each
``memory``                                                    ``peak_bytes``
``open``                                                      begins an empty sequence
``run``         ``tokens``, ``logits`` (``none`` or ``all``)  ``rows``, ``columns``
==============  ============================================  ===========================
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nybble.devices.base import BatchItem
from nybble.devices.base import Sequence as TokenSequence
from nybble.evaluate.benchmark import measure, peak_memory
from nybble.evaluate.vocabulary import digest
from nybble.evaluate.windows import tokens_of

if TYPE_CHECKING:
    from nybble.checkpoint.checkpoint import Checkpoint
    from nybble.model import Model

Answer = dict[str, Any]


class Server:
    """Answers the requests of one evaluation."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._model: Model | None = None
        self._sequence: TokenSequence | None = None

    def serve(self, requests: BinaryIO) -> None:
        """Answer until the input ends."""
        handlers: dict[str, Callable[..., Answer]] = {
            "load": self.load,
            "vocabulary": self.vocabulary,
            "split": self.split,
            "time": self.time,
            "memory": self.memory,
            "open": self.open,
            "run": self.run,
        }
        for line in requests:
            request = json.loads(line)
            try:
                answer = handlers[request.pop("do")](**request)
            except Exception as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            logits = answer.pop("logits", None)
            self._out.write(json.dumps(answer).encode() + b"\n")
            if logits is not None:
                self._out.write(logits.data)
            self._out.flush()

    @property
    def model(self) -> Model:
        """The loaded model."""
        if self._model is None:
            raise ValueError("no model was loaded")
        return self._model

    def load(self, path: str, device: str, options: dict[str, Any], context_length: int) -> Answer:
        """Load a model, with a context no longer than asked for: caches may take all of it at once."""
        from time import perf_counter

        from nybble.loading import from_checkpoint, read_checkpoint_for

        started = perf_counter()
        checkpoint = read_checkpoint_for(device, Path(path))
        longest = checkpoint.config.max_position_embeddings or context_length
        self._model = from_checkpoint(
            checkpoint, device=device, context_length=min(context_length, longest), **options
        )
        session = self._model.session
        return {
            "load_seconds": perf_counter() - started,
            "format": checkpoint.format,
            "vocab_size": session.vocab_size,
            "context_length": session.context_length,
            "threads": getattr(session, "threads", None),
            "weight_bytes": weight_bytes(checkpoint),
            "has_tokenizer": checkpoint.tokenizer is not None,
        }

    def vocabulary(self, ids: list[int]) -> Answer:
        """The bytes that each of these tokens stands for; null for one that the vocabulary lacks."""
        tokenizer = self.model.tokenizer
        size = tokenizer.vocab_size
        return {"pieces": [tokenizer.token_bytes(i).hex() if i < size else None for i in ids]}

    def split(self, text: str, count: int | None) -> Answer:
        """A digest of the ids that the model's own tokenizer gives a text."""
        return {"digest": digest(tokens_of(self.model.tokenizer, text, count))}

    def time(self, prefill: int, decode: int) -> Answer:
        """Seconds of one prefill and one decode after a warm-up."""
        found = measure(self.model.session, prefill=[prefill], decode=[decode], repetitions=1)
        return {result.phase: result.seconds[0] for result in found}

    def memory(self) -> Answer:
        """Largest resident size of this process so far."""
        return {"peak_bytes": peak_memory()}

    def open(self) -> Answer:
        """Begin an empty sequence in place of the one before."""
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None
        self._sequence = self.model.session.new_sequence()
        return {}

    def run(self, tokens: Sequence[int], logits: str) -> Answer:
        """Append tokens to the sequence."""
        if self._sequence is None:
            raise ValueError("no sequence was opened")
        rows = self.model.session.forward([BatchItem(self._sequence, tokens, logits)])
        if logits == "none":
            return {}
        contiguous: npt.NDArray[np.float32] = np.ascontiguousarray(rows, np.float32)
        return {"rows": rows.shape[0], "columns": rows.shape[1], "logits": contiguous}


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a model's weights, also of one that only ONNX Runtime reads."""
    elsewhere = checkpoint.metadata.get("onnx.weight_bytes")
    return checkpoint.stored_bytes or (elsewhere if isinstance(elsewhere, int) else 0)


def main() -> None:
    """Serve standard input until it ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(BrokenPipeError):
        Server(out).serve(sys.stdin.buffer)


if __name__ == "__main__":
    main()
