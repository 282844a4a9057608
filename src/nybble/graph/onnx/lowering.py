"""Lowering: a graph's values on their way to ONNX nodes.

Operators are expanded one after another, but some only note what they mean: neighbouring operators
then become one node (a sum and its norm, a rotation inside attention, q, k and v in one
multiplication). Whoever needs such a value by name makes it be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.tensor import Tensor
from nybble.graph.graph import Graph, Value
from nybble.graph.onnx.names import path
from nybble.graph.onnx.nodes import (
    MICROSOFT,
    NUMPY_TYPES,
    Dimension,
    ElementType,
    Initializer,
    InitializerGroup,
    OnnxGraph,
    OnnxNode,
    OnnxValue,
)
from nybble.graph.onnx.target import Method, Target

ONNX_TYPES: Mapping[str, int] = {
    "f32": 1, "u8": 2, "i8": 3, "i32": 6, "i64": 7, "bool": 9, "f16": 10, "bf16": 16, "u4": 21, "i4": 22,
}  # fmt: skip
"""``TensorProto.DataType``."""


@dataclass(eq=False)
class Matrix:
    """Linears of one input that can be one multiplication: their weights, one under the other."""

    x: Value
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    sizes: tuple[int, ...]
    """Rows of each piece: those of each weight, or what a single weight is split into."""
    stems: tuple[str, ...]
    """A name for each piece."""
    stem: str
    whole: str | None = None
    """The product's name, once it is there."""
    pieces: tuple[str, ...] = ()
    """Names of the pieces, once they are split."""


@dataclass(frozen=True)
class Projection:
    """One piece of a matrix's product, or all of it."""

    matrix: Matrix
    piece: int | None


@dataclass(frozen=True)
class Sum:
    """Two values to be added; a norm that follows takes both."""

    a: Value
    b: Value


@dataclass(frozen=True)
class Rotated:
    """A value to be rotated; attention that follows does it itself where it can."""

    x: Value
    rope: RopeConfig
    head_dim: int


@dataclass
class Lowering:
    """The nodes and initializers made so far, and where the graph's values are."""

    graph: Graph
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    target: Target
    method: Method | None
    nodes: list[OnnxNode] = field(default_factory=list)
    groups: dict[str, InitializerGroup] = field(default_factory=dict)
    """By the name of the first initializer."""
    values: dict[int, str | Projection | Sum | Rotated] = field(default_factory=dict)
    makers: Mapping[type, Callable[[Lowering, Value, Any], str]] = field(default_factory=dict)
    """How a noted value is made, by its class."""
    packs: dict[str, Matrix] = field(default_factory=dict)
    """Matrices of several linears, by the name of each linear's weight."""
    shared: set[str] = field(default_factory=set)
    """Values that several operators share and that are there already."""
    inputs: list[OnnxValue] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.element_type: ElementType = self.target.element_type
        # Gemma's residual stream leaves float16's range.
        gemma = self.config.architecture.startswith("gemma")
        self.stream_type: ElementType = "f32" if gemma else self.element_type
        self.uses = Counter(value.index for node in self.graph.nodes for value in node.inputs)
        self.uses[self.graph.output.index] += 1
        self._types: dict[str, ElementType] = {}
        self._casts: dict[tuple[str, ElementType], str] = {}
        self._names: Counter[str] = Counter()

    # -- values ------------------------------------------------------------------------------------

    def name(self, value: Value, element_type: ElementType | None = None) -> str:
        """The name of a value, made now if it was only noted; cast where another type is asked for."""
        found = self.values[value.index]
        if not isinstance(found, str):
            found = self.values[value.index] = self.makers[type(found)](self, value, found)
        return found if element_type is None else self.cast(found, element_type)

    def type_of(self, name: str) -> ElementType:
        """The element type of a value in the model."""
        return self._types[name]

    def cast(self, name: str, element_type: ElementType) -> str:
        """The value in another type."""
        if self._types[name] == element_type:
            return name
        key = (name, element_type)
        if key not in self._casts:
            base = name.removesuffix("/output_0")
            node = f"{base}/Cast_{element_type}" if base.startswith("/") else f"/model/Cast/{base}"
            self._casts[key] = self.node(
                "Cast", [name], name=node, to=ONNX_TYPES[element_type], element_type=element_type
            )
        return self._casts[key]

    # -- nodes -------------------------------------------------------------------------------------

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        *,
        name: str,
        element_type: ElementType | None = None,
        domain: str = "",
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Appends a node with one output, of the target's type unless another is given."""
        return self.node_with(
            op_type,
            inputs,
            [output or f"{name}/output_0"],
            name=name,
            element_types=[element_type or self.element_type],
            domain=domain,
            **attributes,
        )[0]

    def node_with(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        name: str,
        element_types: Sequence[ElementType],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[str]:
        """Appends a node; an empty name leaves an input or output out."""
        inputs = list(inputs)
        while inputs and not inputs[-1]:
            inputs.pop()
        for output, element_type in zip(outputs, element_types, strict=True):
            if output:
                self._types[output] = element_type
        self.nodes.append(OnnxNode(op_type, tuple(inputs), tuple(outputs), attributes, domain, name))
        return outputs

    def unique(self, name: str) -> str:
        """The name, with a number from its second use on."""
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}_{count - 1}"

    def microsoft(self, op_type: str, inputs: Sequence[str], *, name: str, **attributes: Any) -> str:
        """A node of ONNX Runtime's own operators."""
        return self.node(op_type, inputs, name=name, domain=MICROSOFT, **attributes)

    def constant(self, value: npt.ArrayLike, element_type: ElementType) -> str:
        """A small constant, made once for each value."""
        array = np.asarray(value, NUMPY_TYPES[element_type])
        name = f"/model/constants/{element_type}/{array.tolist()}".replace(" ", "")
        if name not in self._types:
            node = name.replace("/constants/", "/constant_nodes/")
            self.node_with("Constant", [], [name], name=node, element_types=[element_type], value=array)
        return name

    def add_input(self, name: str, element_type: ElementType, shape: Sequence[Dimension]) -> str:
        """Declares an input of the model."""
        self.inputs.append(OnnxValue(name, element_type, tuple(shape)))
        self._types[name] = element_type
        return name

    # -- initializers --------------------------------------------------------------------------------

    def initializers(
        self,
        initializers: Sequence[Initializer],
        make: Callable[[], Sequence[npt.NDArray[Any]]],
        aliases: Sequence[tuple[int, Initializer]] = (),
    ) -> list[str]:
        """Declares initializers that are made together; returns their names."""
        group = InitializerGroup(tuple(initializers), make, tuple(aliases))
        self.groups[initializers[0].name] = group
        for item in (*initializers, *(alias for _, alias in aliases)):
            self._types[item.name] = item.element_type
        return [item.name for item in initializers]

    def initializer(
        self,
        name: str,
        element_type: ElementType,
        shape: Sequence[int],
        make: Callable[[], npt.NDArray[Any]],
    ) -> str:
        """Declares one initializer, if it is not there yet."""
        if name not in self.groups:
            self.initializers([Initializer(name, element_type, tuple(shape))], lambda: [make()])
        return name

    # -- the end -----------------------------------------------------------------------------------

    def finish(self, logits: str, outputs: Sequence[OnnxValue]) -> OnnxGraph:
        """The graph whose first output, called ``logits``, is the value ``logits``."""

        def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple("logits" if name == logits else name for name in names)

        nodes = [
            replace(node, inputs=renamed(node.inputs), outputs=renamed(node.outputs)) for node in self.nodes
        ]
        vocabulary = self.graph.output.width
        first = OnnxValue("logits", self.type_of(logits), ("batch_size", "sequence_length", vocabulary))
        return OnnxGraph(
            "main_graph", tuple(nodes), tuple(self.inputs), (first, *outputs), tuple(self.groups.values())
        )


def node_path(stem: str, *rest: str) -> str:
    """The name of a node that belongs to a weight's stem."""
    return "/".join((path(stem), *rest))
