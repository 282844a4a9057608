"""Runs a graph on made-up tokens: numbers are computed, weights and activations stay symbols.

One batch entry, ``past`` cached tokens and ``tokens`` new ones at the positions past, past + 1, ...
Only what is asked for is run, so that a mask can be looked at for a sequence of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.errors import FormatError, NybbleError, UnsupportedError
from nybble.formats.onnx import proto
from nybble.formats.onnx.external_data import ExternalFiles, Initializer, initializer
from nybble.formats.onnx.recognise import numeric
from nybble.formats.onnx.recognise.values import Array, Known, Quantized, Term, Value, View, Weight
from nybble.formats.onnx.recognise.weights import weight_of

if TYPE_CHECKING:
    import onnx

Outputs = Sequence["Value | None"]
Rule = Callable[["Call"], Outputs]
RUN_INSTEAD = 'run the model as it is with device="onnxruntime:cpu"'

SMALL_INTEGERS = 1 << 16
"""Elements of an integer array that is no packed weight."""


class Node:
    """An ONNX node with its attributes decoded."""

    def __init__(self, node: onnx.NodeProto, where: str) -> None:
        self.title = proto.title(node)
        self.operator = node.op_type
        self.domain = "" if node.domain == "ai.onnx" else node.domain
        self.inputs = list(node.input)
        self.outputs = list(node.output)
        self.attributes = proto.attributes(node, where)


class GraphTable:
    """A graph prepared for look-up: who makes a name, and the stored arrays."""

    def __init__(self, graph: onnx.GraphProto, files: ExternalFiles, where: str) -> None:
        self.where = where
        self.files = files
        self.nodes = [Node(node, where) for node in graph.node]
        self.makers: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in node.outputs:
                if name and self.makers.setdefault(name, index) != index:
                    raise FormatError(f"{where}: two nodes make {name!r}")
        self.stored: dict[str, Initializer] = {}
        for tensor in graph.initializer:
            self.stored[tensor.name] = initializer(tensor, files)
        self.inputs = {value.name: value for value in graph.input if value.name not in self.stored}
        self.outputs = [value.name for value in graph.output]
        self.values: dict[str, Value] = {}
        self.inner: dict[int, GraphTable] = {}
        self.arrays: dict[int, tuple[Weight, Array]] = {}
        """Computed values by id of the weight, which is kept so that ids stay its own."""

    def stored_value(self, name: str) -> Value | None:
        """A stored array by name; None where there is none."""
        found = self.values.get(name)
        if found is None and name in self.stored:
            found = self.values[name] = value_of(self.stored[name])
        return found

    def subgraph(self, graph: onnx.GraphProto) -> GraphTable:
        """The table of a graph inside a node."""
        found = self.inner.get(id(graph))
        if found is None:
            found = self.inner[id(graph)] = GraphTable(graph, self.files, self.where)
        return found

    def slice_of(self, names: Sequence[str], known: Mapping[str, object]) -> list[int]:
        """Indices of the nodes that the names need, in order; ``known`` names need nothing."""
        wanted: set[int] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            index = self.makers.get(name)
            if index is None or index in wanted or name in known:
                continue
            wanted.add(index)
            stack += [item for item in self.nodes[index].inputs if item]
        return sorted(wanted)


def value_of(stored: Initializer) -> Value:
    """A stored array as a value: small integers and single numbers are known, the rest are weights."""
    small = stored.size <= SMALL_INTEGERS and stored.element in ("i32", "i64", "bool")
    if small or (stored.size == 1 and stored.element not in ("u4", "i4", "u8", "i8")):
        return Known(weight_of(stored).known())
    return weight_of(stored)


class Call:
    """One node with the values of its inputs, as the rules see it."""

    def __init__(self, probe: Probe, node: Node, inputs: list[Value | None]) -> None:
        self.probe = probe
        self.node = node
        self.inputs = inputs

    def unsupported(self, problem: str) -> UnsupportedError:
        """The error for a node that is not recognised."""
        return UnsupportedError(f"node {self.node.title}: {problem}; {RUN_INSTEAD}")

    def optional(self, at: int) -> Value | None:
        """An input, or None where it is left out."""
        return self.inputs[at] if at < len(self.inputs) else None

    def view(self, at: int) -> View:
        """An input that is an activation."""
        value = self.optional(at)
        if not isinstance(value, View):
            raise self.unsupported(f"input {at} is no activation")
        return value

    def weight(self, at: int) -> Weight:
        """An input that is stored."""
        value = self.optional(at)
        if isinstance(value, Known):
            array = value.array
            return Weight(array.shape, "f32", lambda: array.astype(np.float32), ("known", id(array)), False)
        if not isinstance(value, Weight):
            raise self.unsupported(f"input {at} is no stored weight")
        return value

    def optional_weight(self, at: int) -> Weight | None:
        """An input that is stored or left out."""
        return None if self.optional(at) is None else self.weight(at)

    def known(self, at: int) -> Array:
        """An input that is computed."""
        value = self.optional(at)
        if value is None:
            raise self.unsupported(f"input {at} is missing")
        return self.probe.known(value, self)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        value = self.node.attributes.get(name, default)
        if default is not None and not isinstance(value, type(default)):
            number = isinstance(value, int) and isinstance(default, float)
            if not number:
                raise self.unsupported(f"the attribute {name} is of another type")
        return value

    def allow(self, *names: str) -> None:
        """Refuses attributes that the rule does not know."""
        unknown = set(self.node.attributes) - set(names)
        if unknown:
            raise self.unsupported(f"unknown attributes {', '.join(sorted(unknown))}")

    def term(self, operator: str, args: Sequence[Term], shape: Sequence[int], **values: Any) -> Term:
        """A new term that names this node."""
        return Term(operator, tuple(args), tuple(shape), self.node.title, values)


class Probe:
    """One made-up run. ``get`` gives the value of a name."""

    def __init__(
        self,
        table: GraphTable,
        inputs: Mapping[str, Value],
        rules: Mapping[tuple[str, str], Rule],
        *,
        past: int,
        tokens: int,
        parent: Probe | None = None,
    ) -> None:
        self.table = table
        self.past = past
        self.tokens = tokens
        self._rules = rules
        self._parent = parent
        self._values: dict[str, Value] = dict(inputs)

    @property
    def total(self) -> int:
        """Length of the sequence, new tokens included."""
        return self.past + self.tokens

    def get(self, name: str) -> Value:
        """What the name stands for; its nodes are run when needed.

        Raises:
            UnsupportedError: a node that is not recognised.
            FormatError: a name that nothing makes, or a node whose inputs do not fit.
        """
        found = self._look(name)
        if found is not None:
            return found
        for index in self.table.slice_of([name], self._values):
            self._run(self.table.nodes[index])
        found = self._look(name)
        if found is None:
            raise FormatError(f"{self.table.where}: nothing makes {name!r}")
        return found

    def known(self, value: Value, call: Call) -> Array:
        """A value as an array."""
        if isinstance(value, Known):
            return value.array
        if isinstance(value, Weight):
            return self.stored_array(value)
        raise call.unsupported("depends on activations where only lengths and positions may count")

    def stored_array(self, weight: Weight) -> Array:
        """A stored array's values, computed once for all runs."""
        found = self.table.arrays.get(id(weight))
        if found is None:
            found = self.table.arrays[id(weight)] = (weight, weight.known())
        return found[1]

    def _look(self, name: str) -> Value | None:
        found = self._values.get(name)
        if found is None:
            found = self.table.stored_value(name)
        if found is None and self._parent is not None and name not in self.table.makers:
            found = self._parent.get(name)
        return found

    def _input(self, name: str, node: Node) -> Value | None:
        if not name:
            return None
        found = self._look(name)
        if found is None:
            raise FormatError(
                f"{self.table.where}: {node.title} reads {name!r}, which nothing before it makes"
            )
        return found

    def _run(self, node: Node) -> None:
        call = Call(self, node, [self._input(name, node) for name in node.inputs])
        try:
            with np.errstate(all="ignore"):  # files may hold any number
                outputs = self._outputs(call)
        except NybbleError as error:
            if node.title in str(error):
                raise
            raise type(error)(f"node {node.title}: {error}; {RUN_INSTEAD}") from error
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{self.table.where}: node {node.title}: {error!r}") from error
        for name, value in zip(node.outputs, outputs, strict=False):
            if name and value is not None:
                self._values[name] = value

    def _outputs(self, call: Call) -> Outputs:
        node = call.node
        if (node.domain, node.operator) == ("", "If"):
            return list(self._branch(call))
        if (node.domain, node.operator) == ("", "Constant"):
            return [self._constant(call)]
        rule = self._rules.get((node.domain, node.operator))
        given = [value for value in call.inputs if value is not None]
        if rule is not None and not all(isinstance(value, Known) for value in given):
            outputs = rule(call)
            if outputs:
                return outputs
        operator = numeric.OPERATORS.get(node.operator) if node.domain == "" else None
        if operator is None:
            raise call.unsupported(f"this operator ({node.domain or 'ai.onnx'}) is not recognised here")
        arrays = [None if value is None else self.known(value, call) for value in call.inputs]
        extra: dict[str, Any] = {"outputs": len(node.outputs)}
        if node.operator == "ConstantOfShape" and "value" in node.attributes:
            extra["value_array"] = weight_of(initializer(node.attributes["value"], self.table.files)).known()
        return [Known(array) for array in operator(arrays, {**node.attributes, **extra})]

    def _branch(self, call: Call) -> Iterator[Value]:
        condition = call.known(0)
        graph = call.attribute("then_branch" if bool(condition.reshape(-1)[0]) else "else_branch")
        table = self.table.subgraph(graph)
        inner = Probe(table, {}, self._rules, past=self.past, tokens=self.tokens, parent=self)
        for name in table.outputs:
            yield inner.get(name)

    def _constant(self, call: Call) -> Value:
        found = self.table.values.get(call.node.outputs[0])
        if found is None:
            found = self.table.values[call.node.outputs[0]] = _constant(call)
        return found


def _constant(call: Call) -> Value:
    attributes = call.node.attributes
    if "value" in attributes:
        stored = initializer(attributes["value"], call.probe.table.files)
        named = Initializer(stored.name or call.node.outputs[0], stored.element, stored.shape, stored.source)
        return value_of(named)
    for key, kind in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if key in attributes:
            return Known(np.asarray(attributes[key], kind))
    raise call.unsupported("a constant of a kind that is not supported")


__all__ = ["Call", "GraphTable", "Known", "Node", "Probe", "Quantized", "Rule", "Value"]
