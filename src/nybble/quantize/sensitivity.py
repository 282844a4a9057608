"""Sensitivity: how far a model's predictions move when one matrix alone is rounded coarsely, measured.

Every matrix in turn is rounded to 3 bits (``PROBE``), and the model is run on some text: the mean KL
divergence of its predictions from the original's is the price of that matrix's error. Small divergences grow
with the square of the error, so the price of another encoding is estimated as

    KL(encoding) = (KL(probe) - floor) * error(encoding) / error(probe)

with squared errors weighed by importance, of some rows. The floor is what 16-bit activations alone make of a
change too small to matter: the least that a probe gave of a matrix rounded to 8 bits.

A run is kept after every few matrices, so that a kill costs little.

Sources: sensitivity from measured outputs as in arXiv:1911.03852 (HAWQ-V2 has the trace of the Hessian in its
place), 3 bits as the probe because 8 and 4 bits drown in the noise of 16-bit arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.devices.base import BatchItem
from nybble.devices.cpu import compile_session
from nybble.errors import FormatError, NybbleError
from nybble.formats.mapping import release_pages
from nybble.formats.output import staged_file
from nybble.quantize.importance import ImportanceMatrix
from nybble.quantize.matrices import round_matrix
from nybble.quantize.recipe import dividing

Floats = npt.NDArray[np.float32]

PROBE = "int3_g32_f16"
FLOOR_PROBE = "int8_g32_f16"
FLOORS = 3
"""Matrices that the floor is measured with."""
ROWS = 256
"""Rows of a matrix whose errors are compared."""
TOKENS = 1024
WINDOW = 256
"""Tokens that predictions are compared at, and tokens of a window."""
_LOGITS = 1 << 27
"""Most logits of the original that are kept: models with large vocabularies see fewer tokens."""
_SAVE_SECONDS = 20.0
_VERSION = 1


@dataclass(frozen=True)
class Sensitivity:
    """Of one matrix."""

    kld: float
    """Mean KL divergence of the predictions under the probe, above the floor, in nats."""
    error: float
    """The probe's squared error, weighed, relative to the matrix."""

    def predicted(self, error: float) -> float:
        """The KL divergence of an encoding with this relative squared error."""
        return self.kld * error / self.error if self.error > 0 else 0.0


def tokens_for(vocab_size: int) -> int:
    """How many tokens predictions are compared at."""
    return max(WINDOW, min(TOKENS, _LOGITS // vocab_size // WINDOW * WINDOW))


def relative_error(tensor: Tensor, name: str, importance: ImportanceMatrix | None) -> float:
    """Squared error of an encoding over the squared values, both weighed, of some evenly spread rows."""
    rows, columns = tensor.shape
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, ROWS)).astype(np.int64))
    encoded = tensor.data.reshape(rows, -1)[chosen]
    values = tensor.encoding.dequantize(np.ascontiguousarray(encoded).reshape(-1)).reshape(-1, columns)
    weights = None if importance is None else importance.weights(tensor.name)
    kind = encoding(name)
    if kind.block_size == 1:
        assert kind.quantize is not None
        data = kind.quantize(values.reshape(-1))
    else:
        data = round_matrix(values, name, importance=weights)
    difference = kind.dequantize(data).reshape(values.shape) - values
    count: Floats = np.ones(columns, np.float32) if weights is None else weights
    whole = float(np.sum(values * values * count, dtype=np.float64))
    return float(np.sum(difference * difference * count, dtype=np.float64)) / whole if whole else 0.0


def measure_sensitivities(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    names: Sequence[str],
    importance: ImportanceMatrix | None,
    *,
    threads: int | None = None,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Sensitivity]:
    """The sensitivity of each of the named matrices.

    Args:
        checkpoint: the model.
        windows: token ids.
        names: of matrices.
        importance: what errors are weighed with.
        threads: at most; None: the cores that this process may use.
        state: a file that keeps what is done; it is not removed.
        fingerprint: of all that the results depend on; a state of another one is not used.
        progress: called with the matrices done and all of them.

    Raises:
        NybbleError: the model's predictions are not finite.
    """
    done = _read_state(state, fingerprint)
    saved = perf_counter()
    if missing := [name for name in names if name not in done]:
        probe = _Prober(checkpoint, windows, importance, threads)
        floor = done.get("")
        if floor is None:
            evenly = [names[i] for i in np.linspace(0, len(names) - 1, min(FLOORS, len(names))).astype(int)]
            floor = Sensitivity(min(probe.kld(name, FLOOR_PROBE) for name in evenly), 0.0)
            done[""] = floor
        for number, name in enumerate(missing):
            if progress is not None:
                progress(len(names) - len(missing) + number, len(names))
            kld = max(probe.kld(name, PROBE) - floor.kld, 0.0)
            tensor = checkpoint.tensors[name]
            done[name] = Sensitivity(kld, relative_error(tensor, dividing(PROBE, tensor), importance))
            if perf_counter() - saved > _SAVE_SECONDS:
                _write_state(state, fingerprint, done)
                saved = perf_counter()
        _write_state(state, fingerprint, done)
    return {name: done[name] for name in names}


class _Prober:
    """Runs a model with one matrix changed, and compares."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Sequence[int]],
        importance: ImportanceMatrix | None,
        threads: int | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._windows = [[int(token) for token in window] for window in windows]
        self._importance = importance
        self._threads = threads
        self._original = self._logits(checkpoint)
        for logits in self._original:
            if not np.isfinite(logits).all():
                raise NybbleError(
                    "the model's predictions are not finite: its weights or its config are broken"
                )
            _to_log_probabilities(logits)

    def kld(self, name: str, kind: str) -> float:
        """Mean KL divergence with one matrix rounded."""
        tensor = self._checkpoint.tensors[name]
        kind = dividing(kind, tensor)
        columns = tensor.shape[1]
        weights = None if self._importance is None else self._importance.weights(name)
        rows = max(1, (1 << 24) // columns)
        encoded = tensor.data.reshape(tensor.shape[0], -1)
        parts = []
        for start in range(0, tensor.shape[0], rows):
            part = np.ascontiguousarray(encoded[start : start + rows]).reshape(-1)
            values = tensor.encoding.dequantize(part).reshape(-1, columns)
            parts.append(round_matrix(values, kind, importance=weights, threads=self._threads))
        rounded = tensor.changed(encoding=encoding(kind), data=np.concatenate(parts))
        changed = replace(self._checkpoint, tensors={**self._checkpoint.tensors, name: rounded})
        found = [
            divergence(original, logits)
            for original, logits in zip(self._original, self._logits(changed), strict=True)
        ]
        release_pages()
        return float(np.mean(np.concatenate(found)))

    def _logits(self, checkpoint: Checkpoint) -> list[Floats]:
        session = compile_session(
            checkpoint, context_length=max(map(len, self._windows)), threads=self._threads
        )
        logits = []
        try:
            for window in self._windows:
                sequence = session.new_sequence()
                logits.append(np.array(session.forward([BatchItem(sequence, window, "all")])))
                sequence.close()
        finally:
            session.close()
        return logits


def divergence(log_probabilities: Floats, logits: Floats) -> npt.NDArray[np.float64]:
    """KL(original || other) of each row, nats; ``logits`` (rows, vocab_size) is overwritten."""
    rows = len(logits)
    out = np.empty(rows)

    def work(row: int) -> None:
        own, other = log_probabilities[row], logits[row]
        other -= other.max()
        # sum p (log p - x) + log sum exp x, in float32 with sums in pairs: errors of 1e-6 nats.
        expected = float(np.dot(np.exp(own), own - other))
        out[row] = expected + float(np.log(np.exp(other).sum(dtype=np.float64)))

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, range(rows)))
    return out


def _to_log_probabilities(logits: Floats) -> None:
    """In place."""
    logits -= logits.max(axis=1, keepdims=True)
    for row in range(len(logits)):
        logits[row] -= np.float32(np.log(np.exp(logits[row]).sum(dtype=np.float64)))


def _read_state(state: Path | None, fingerprint: str) -> dict[str, Sensitivity]:
    if state is None or not state.is_file():
        return {}
    try:
        content = json.loads(state.read_bytes())
        if content["fingerprint"] != fingerprint or content["version"] != _VERSION:
            return {}
        return {name: Sensitivity(float(kld), float(error)) for name, (kld, error) in content["done"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"{state}: is damaged ({error}); remove it to begin anew") from error


def _write_state(state: Path | None, fingerprint: str, done: Mapping[str, Sensitivity]) -> None:
    if state is None:
        return
    content = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "done": {name: [found.kld, found.error] for name, found in done.items()},
    }
    with staged_file(state, overwrite=True) as stage:
        stage.write_text(json.dumps(content), encoding="ascii")
