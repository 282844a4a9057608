"""Graph: the few operators that a model is made of, and the builder that models use.

Values are matrices of float32 with one row a token (ragged batches are concatenated) and a fixed
number of columns, the value's *width*. Weights are named; the device looks them up in the
checkpoint. No device and no quantization appears here. Meaning of every operator:
``graph/reference.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nybble.checkpoint.config import RopeConfig
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError

SEQUENCE_SCALE_MULTIPLE = 32
"""See ``GraphBuilder.scale_by_sequence``."""


@dataclass(frozen=True)
class Value:
    """One matrix in the graph: (tokens, width) float32."""

    index: int
    width: int


@dataclass(frozen=True)
class Node:
    """One operator: what it reads, what it writes, which weights and constants it uses."""

    operator: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A model's operators in order. ``output`` holds the logits: (rows asked for, vocab_size)."""

    nodes: tuple[Node, ...]
    output: Value
    num_layers: int


class GraphBuilder:
    """What ``models/<family>.py`` calls: each method appends one node and returns its value.

    Shapes come from the checkpoint's tensors and are checked here, so a file whose tensors do not
    fit its config is refused with the tensor's name before anything runs.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._nodes: list[Node] = []
        self._values = 0
        self._layers = 0
        self._gathered: dict[tuple[int, bytes], int] = {}

    # -- operators -----------------------------------------------------------------------------

    def embedding(self, weight: str, *, scale: float = 1.0) -> Value:
        """Rows of ``weight`` (vocab_size, width) picked by token id, times ``scale``."""
        width = self._matrix(weight)[1]
        return self._add("embedding", (), width, (weight,), scale=scale)

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Value:
        """x @ weight.T + bias; weight: (out_features, in_features), bias: (out_features)."""
        rows, columns = self._matrix(weight)
        if columns != x.width:
            raise FormatError(
                f"{weight}: has {columns} input features, but the value before it has {x.width}"
            )
        weights: tuple[str, ...] = (weight,)
        if bias is not None:
            self._vector(bias, rows)
            weights = (weight, bias)
        return self._add("linear", (x,), rows, weights)

    def rms_norm(
        self, x: Value, weight: str, *, eps: float, offset: float = 0.0, group: int | None = None
    ) -> Value:
        """x / sqrt(mean(x**2) + eps) * (weight + offset), over each ``group`` columns (default: all)."""
        size = x.width if group is None else group
        if x.width % size:
            raise FormatError(f"{weight}: width {x.width} is not a multiple of the group {size}")
        self._vector(weight, size)
        return self._add("rms_norm", (x,), x.width, (weight,), eps=eps, offset=offset, group=size)

    def rotary(self, x: Value, *, head_dim: int, rope: RopeConfig | None) -> Value:
        """Rotary position embedding over each head of ``x``; ``rope=None`` returns ``x`` itself."""
        if rope is None:
            return x
        if not 2 <= rope.rotary_dim <= head_dim or rope.rotary_dim % 2:
            raise FormatError(f"rotary: cannot rotate {rope.rotary_dim} features of a head of {head_dim}")
        return self._add("rotary", (x,), x.width, (), head_dim=head_dim, rope=rope)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        layer: int,
        head_dim: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Value:
        """Causal attention of every sequence over its own cache, which k and v are appended to.

        Heads are ``q.width / head_dim``, key-value heads ``k.width / head_dim`` (grouped-query
        attention repeats each for heads / key-value heads queries). ``window``: a query at
        position p sees keys p - window + 1 .. p.
        """
        if q.width % head_dim or k.width % head_dim or k.width != v.width:
            raise FormatError(
                f"attention of layer {layer}: widths q {q.width}, k {k.width}, v {v.width} "
                f"do not fit head_dim {head_dim}"
            )
        if (q.width // head_dim) % (k.width // head_dim):
            raise FormatError(
                f"attention of layer {layer}: {q.width // head_dim} heads are not a multiple of "
                f"{k.width // head_dim} key-value heads"
            )
        self._layers = max(self._layers, layer + 1)
        return self._add(
            "attention", (q, k, v), q.width, (),
            layer=layer, head_dim=head_dim, scale=scale, window=window, softcap=softcap,
        )  # fmt: skip

    def gated_activation(self, gate: Value, up: Value, kind: str) -> Value:
        """activation(gate) * up; ``kind``: silu, gelu or gelu_pytorch_tanh."""
        if gate.width != up.width:
            raise FormatError(f"gate has {gate.width} features and up has {up.width}")
        return self._add("gated_activation", (gate, up), gate.width, (), kind=kind)

    def gather_columns(self, x: Value, name: str) -> Value:
        """Columns of ``x`` in another order: column i of the result is column permutation[i] of ``x``.

        ``name``: i32 tensor (width,) that holds every column once. Where the same columns of ``x``
        were gathered before, that value is returned and the node gets one name more: the linears
        after it then share their input.
        """
        columns = self._permutation(name, x.width)
        key = (x.index, columns)
        place = self._gathered.get(key)
        if place is None:
            self._gathered[key] = len(self._nodes)
            return self._add("gather_columns", (x,), x.width, (name,))
        node = self._nodes[place]
        self._nodes[place] = replace(node, weights=(*node.weights, name))
        return node.outputs[0]

    def scale_by_sequence(self, x: Value, slots: str, scales: str) -> Value:
        """Column i times scales[i] * weights[slots[i]], the weights being those of the row's sequence.

        ``slots``: i32 tensor (width,), the adapter of each column; ``scales``: f32 tensor (width,).
        A column whose factor is 0 becomes 0, whatever it holds. Columns of zeros follow, up to a
        multiple of ``SEQUENCE_SCALE_MULTIPLE``: what a fast linear after it wants.
        """
        self._slots(slots, x.width)
        self._vector(scales, x.width)
        width = x.width + -x.width % SEQUENCE_SCALE_MULTIPLE
        return self._add("scale_by_sequence", (x,), width, (slots, scales))

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        if a.width != b.width:
            raise FormatError(f"cannot add values of width {a.width} and {b.width}")
        return self._add("add", (a, b), a.width, ())

    def scale(self, x: Value, factor: float) -> Value:
        """x * factor; a factor of 1 returns ``x`` itself."""
        return x if factor == 1.0 else self._add("scale", (x,), x.width, (), factor=factor)

    def softcap(self, x: Value, cap: float | None) -> Value:
        """cap * tanh(x / cap); None returns ``x`` itself."""
        return x if cap is None else self._add("softcap", (x,), x.width, (), cap=cap)

    def split(self, x: Value, widths: Sequence[int]) -> tuple[Value, ...]:
        """Neighbouring column ranges of ``x``; ``widths`` add up to its width."""
        if sum(widths) != x.width or min(widths) <= 0:
            raise FormatError(f"cannot split a value of width {x.width} into {list(widths)}")
        outputs = tuple(self._value(width) for width in widths)
        self._nodes.append(Node("split", (x,), outputs))
        return outputs

    def select_rows(self, x: Value) -> Value:
        """Only the rows whose logits the batch asks for."""
        return self._add("select_rows", (x,), x.width, ())

    def finish(self, logits: Value) -> Graph:
        """The graph whose result is ``logits``."""
        return Graph(tuple(self._nodes), logits, self._layers)

    # -- what the model files ask of the checkpoint ----------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds this tensor."""
        return name in self._tensors

    # -- internals -------------------------------------------------------------------------------

    def _value(self, width: int) -> Value:
        self._values += 1
        return Value(self._values - 1, width)

    def _add(
        self,
        operator: str,
        inputs: tuple[Value, ...],
        width: int,
        weights: tuple[str, ...],
        **attributes: Any,
    ) -> Value:
        output = self._value(width)
        self._nodes.append(Node(operator, inputs, (output,), weights, attributes))
        return output

    def _tensor(self, name: str) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise FormatError(f"the checkpoint lacks the tensor {name}")
        return tensor

    def _matrix(self, name: str) -> tuple[int, int]:
        shape = self._tensor(name).shape
        if len(shape) != 2 or min(shape) <= 0:
            raise FormatError(f"{name}: expected a matrix, found shape {shape}")
        return shape[0], shape[1]

    def _permutation(self, name: str, size: int) -> bytes:
        """The tensor's bytes; devices index with them unchecked."""
        tensor = self._tensor(name)
        if tensor.encoding.name != "i32" or tensor.shape != (size,):
            raise FormatError(
                f"{name}: expected i32 of shape ({size},), found {tensor.encoding.name} {tensor.shape}"
            )
        data = tensor.data.tobytes()
        if not np.array_equal(np.sort(np.frombuffer(data, "<i4")), np.arange(size)):
            raise FormatError(f"{name}: is no permutation of 0 .. {size - 1}")
        return data

    def _slots(self, name: str, size: int) -> None:
        """Checks numbers of adapters; devices index with them unchecked."""
        tensor = self._tensor(name)
        if tensor.encoding.name != "i32" or tensor.shape != (size,):
            raise FormatError(
                f"{name}: expected i32 of shape ({size},), found {tensor.encoding.name} {tensor.shape}"
            )
        if np.ascontiguousarray(tensor.data).view("<i4").min() < 0:
            raise FormatError(f"{name}: holds a number below 0")

    def _vector(self, name: str, size: int) -> None:
        shape = self._tensor(name).shape
        if shape != (size,):
            raise FormatError(f"{name}: expected shape ({size},), found {shape}")
