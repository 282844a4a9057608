"""ReferenceSession: the Session of the reference device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.tensor import Tensor
from nybble.devices.base import BatchItem, adapter_weights
from nybble.devices.base import Sequence as AnySequence
from nybble.devices.batch import check_batch
from nybble.devices.longrope import Run, longrope_of, plan_run
from nybble.devices.token_sequence import TokenSequence
from nybble.errors import Cancelled, DeviceError
from nybble.graph import Graph, Node, reference
from nybble.graph.rotary import rotary_frequencies
from nybble.models import build_graph

Floats = npt.NDArray[np.float32]


class ReferenceSequence(TokenSequence):
    """Tokens and, for each layer, keys and values (length, key_value_heads * head_dim)."""

    def __init__(self, adapters: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.adapters = adapters
        """The weight of each LoRA adapter."""
        self.cache: dict[int, tuple[Floats, Floats]] = {}
        self.long = False
        """Which divisors of LongRoPE the keys were rotated with."""
        self.closed = False

    def fork(self) -> ReferenceSequence:
        """A copy; the arrays are shared, for nothing writes into them."""
        self.check_open()
        other = ReferenceSequence(self.adapters)
        other.commit(self._tokens, dict(self.cache), self.long)
        return other

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on.

        Raises:
            ValueError: ``length`` is negative or more than the sequence has.
        """
        self.check_open()
        self.check_length(length)
        del self._tokens[length:]
        self.cache = {layer: (k[:length], v[:length]) for layer, (k, v) in self.cache.items()}

    def commit(self, tokens: Sequence[int], cache: dict[int, tuple[Floats, Floats]], long: bool) -> None:
        """Take over the state after a run."""
        self._tokens = list(tokens)
        self.cache = cache
        self.long = long

    def check_open(self) -> None:
        """DeviceError after ``close``."""
        if self.closed:
            raise DeviceError("the sequence is closed")

    def close(self) -> None:
        """Free the cache."""
        self.commit([], {}, False)
        self.closed = True


@dataclass
class _Part:
    """One batch item while it runs: rows ``begin .. end`` of every value before select_rows."""

    sequence: ReferenceSequence
    run: Run
    begin: int
    cache: dict[int, tuple[Floats, Floats]]

    @property
    def end(self) -> int:
        return self.begin + len(self.run.tokens)

    @property
    def length(self) -> int:
        return self.run.start + len(self.run.tokens)


class ReferenceSession:
    """A graph and its weights, run with NumPy."""

    def __init__(
        self, graph: Graph, tensors: Mapping[str, Tensor], context_length: int, adapters: int = 0
    ) -> None:
        self._adapters = adapters
        self._graph = graph
        self._tensors = tensors
        self._weights: dict[str, Floats] = {}
        self._context_length = context_length
        self._longrope = longrope_of(graph)
        self._cancelled = threading.Event()
        self._running = False

    @property
    def vocab_size(self) -> int:
        return self._graph.output.width

    @property
    def context_length(self) -> int:
        return self._context_length

    def new_sequence(self, adapters: Sequence[float] = ()) -> ReferenceSequence:
        return ReferenceSequence(adapter_weights(adapters, self._adapters))

    def forward(self, batch: Sequence[BatchItem]) -> Floats:
        """See ``Session.forward``."""
        parts, rows = self._prepare(batch)
        tokens = np.array([token for part in parts for token in part.run.tokens], np.int64)
        step = _Step(self._weight, self._indices, parts, tokens, np.array(rows, np.int64))
        self._cancelled.clear()
        self._running = True
        try:
            for node in self._graph.nodes:
                if self._cancelled.is_set():
                    raise Cancelled("the computation was cancelled; the sequences are as before")
                step.run(node)
        finally:
            self._running = False
        for part in parts:
            kept = part.sequence.tokens[: part.run.start]
            part.sequence.commit([*kept, *part.run.tokens], part.cache, part.run.long)
        return step.values[self._graph.output.index]

    def _prepare(self, batch: Sequence[BatchItem]) -> tuple[list[_Part], list[int]]:
        """The runs, and the rows whose logits are asked for; checks all before anything runs."""
        parts: list[_Part] = []
        rows: list[int] = []
        begin = 0
        check_batch(batch, owned=_check_open, vocab_size=self.vocab_size, context_length=self._context_length)
        for item in batch:
            sequence = _own(item.sequence)
            run = (
                plan_run(self._longrope, sequence.tokens, sequence.long, item.tokens)
                if item.tokens
                else Run((), sequence.length, 0, sequence.long)
            )
            part = _Part(sequence, run, begin, dict(sequence.cache))
            if item.logits == "all":
                rows += range(begin + run.repeated, part.end)
            elif item.logits == "last":
                rows.append(part.end - 1)
            parts.append(part)
            begin = part.end
        return parts, rows

    def cancel(self) -> None:
        """See ``Session.cancel``."""
        if self._running:
            self._cancelled.set()

    def close(self) -> None:
        """Free the decoded weights."""
        self._weights.clear()

    def _weight(self, name: str) -> Floats:
        weight = self._weights.get(name)
        if weight is None:
            weight = self._weights[name] = self._tensors[name].dequantize()
        return weight

    def _indices(self, name: str) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(self._tensors[name].data).view("<i4")


class _Step:
    """The values of one forward call."""

    def __init__(
        self,
        weight: Callable[[str], Floats],
        indices: Callable[[str], npt.NDArray[np.int32]],
        parts: Sequence[_Part],
        tokens: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> None:
        self.values: dict[int, Floats] = {}
        self._selected: set[int] = set()
        self._weight = weight
        self._indices = indices
        self._parts = parts
        self._tokens = tokens
        self._rows = rows

    def run(self, node: Node) -> None:
        inputs = [self.values[value.index] for value in node.inputs]
        special = _SPECIAL.get(node.operator)
        if special is not None:
            outputs = special(self, node, inputs)
        else:
            weights = [self._weight(name) for name in node.weights]
            outputs = [getattr(reference, _PLAIN[node.operator])(*inputs, *weights, **node.attributes)]
        for value, output in zip(node.outputs, outputs, strict=True):
            self.values[value.index] = output
        if node.operator == "select_rows" or any(value.index in self._selected for value in node.inputs):
            self._selected.update(value.index for value in node.outputs)

    def embedding(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        return [reference.embedding(self._tokens, self._weight(node.weights[0]), **node.attributes)]

    def split(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        return reference.split(inputs[0], [value.width for value in node.outputs])

    def gather_columns(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        return [reference.gather_columns(inputs[0], self._indices(node.weights[0]))]

    def scale_by_sequence(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        slots, scales = self._indices(node.weights[0]), self._weight(node.weights[1])
        weights = np.array([part.sequence.adapters for part in self._parts], np.float32)
        rows = np.repeat(weights, [len(part.run.tokens) for part in self._parts], axis=0)
        if node.inputs[0].index in self._selected:
            rows = rows[self._rows]
        return [reference.scale_by_sequence(inputs[0], rows, slots, scales)]

    def select_rows(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        return [reference.select_rows(inputs[0], self._rows)]

    def rotary(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        rope = node.attributes["rope"]
        result = np.empty_like(inputs[0])
        for part in self._parts:
            frequencies, factor = rotary_frequencies(rope, part.length)
            result[part.begin : part.end] = reference.rotary(
                inputs[0][part.begin : part.end],
                np.arange(part.run.start, part.length),
                frequencies,
                factor,
                head_dim=node.attributes["head_dim"],
                interleaved=rope.interleaved,
            )
        return [result]

    def attention(self, node: Node, inputs: list[Floats]) -> list[Floats]:
        q, k, v = inputs
        constants = dict(node.attributes)
        layer = constants.pop("layer")
        result = np.empty_like(q)
        for part in self._parts:
            own = slice(part.begin, part.end)
            keys, values = k[own], v[own]
            if part.run.start:
                old_keys, old_values = part.cache[layer]
                keys = np.concatenate((old_keys[: part.run.start], keys))
                values = np.concatenate((old_values[: part.run.start], values))
            part.cache[layer] = keys, values
            result[own] = reference.attention(q[own], keys, values, **constants)
        return [result]


_SPECIAL: Mapping[str, Callable[[_Step, Node, list[Floats]], list[Floats]]] = {
    "embedding": _Step.embedding,
    "split": _Step.split,
    "gather_columns": _Step.gather_columns,
    "scale_by_sequence": _Step.scale_by_sequence,
    "select_rows": _Step.select_rows,
    "rotary": _Step.rotary,
    "attention": _Step.attention,
}
"""Operators that need the batch (tokens, positions, caches, rows asked for) or no float weights."""

_PLAIN = {
    "linear": "linear",
    "rms_norm": "rms_norm",
    "gated_activation": "gated_activation",
    "add": "add",
    "scale": "scale",
    "softcap": "softcap_logits",
}
"""Operators that are a function of their inputs, weights and attributes alone."""


def compile_session(checkpoint: Checkpoint, *, context_length: int | None = None) -> ReferenceSession:
    """Makes a checkpoint ready to run on the reference device.

    ``context_length`` defaults to what the model was trained for.

    Raises:
        UnsupportedError: an architecture that is not known.
        FormatError: tensors that are missing or do not fit the config.
    """
    length = context_length or checkpoint.config.max_position_embeddings
    adapters = len(checkpoint.adapters)
    return ReferenceSession(build_graph(checkpoint), checkpoint.tensors, length, adapters)


def _own(sequence: AnySequence) -> ReferenceSequence:
    if not isinstance(sequence, ReferenceSequence):
        raise DeviceError("the sequence belongs to another device")
    return sequence


def _check_open(sequence: AnySequence) -> None:
    _own(sequence).check_open()
