"""A model's graph cut into its layers: each takes the hidden states that the one before it gives.

For work that goes through a model layer by layer with many tokens at once, so that one layer's
weights and nothing else of the model need be in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nybble.errors import UnsupportedError
from nybble.graph.graph import Graph, Node, Value

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class GraphLayers:
    """``embedding`` makes the hidden states; the output of each of ``layers`` is the next one's input."""

    embedding: Node
    layers: tuple[Graph, ...]
    """Each starts with a node ``hidden``, the caller's hidden states; its output are those after it, of
    the rows that the batch asks for."""
    head: Graph
    """The same with the final norm and the output matrix: its output are the logits."""

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden states."""
        return self.embedding.outputs[0].width


def split_layers(graph: Graph) -> GraphLayers:
    """Cuts a graph where each layer's first weight is used.

    Raises:
        UnsupportedError: its layers do not follow each other, or pass on more than hidden states.
    """
    starts = _starts(graph)
    nodes = graph.nodes
    embedding = nodes[0]
    if starts[0] != 1 or embedding.operator != "embedding":
        raise UnsupportedError(
            "only models whose first layer reads plain token embeddings run layer by layer;"
            f" this one begins with {', '.join(node.operator for node in nodes[: starts[0]])}"
        )
    inputs = [_crossing(graph, start) for start in starts]
    parts = []
    for number, start in enumerate(starts):
        last = number + 1 == len(starts)
        end, output = (len(nodes), graph.output) if last else (starts[number + 1], inputs[number + 1])
        parts.append(_part(nodes[start:end], inputs[number], output))
    return GraphLayers(embedding, tuple(parts[:-1]), parts[-1])


def _starts(graph: Graph) -> list[int]:
    """The first node of each layer, and that of the final norm."""
    starts: list[int] = []
    head: int | None = None
    for index, node in enumerate(graph.nodes):
        layers = {int(match[1]) for name in node.weights if (match := _LAYER.match(name))}
        if node.weights and not layers and starts and head is None:
            head = index
        for layer in layers:
            if layer == len(starts) and head is None:
                starts.append(index)
            elif layer != len(starts) - 1 or head is not None:
                raise UnsupportedError(f"the model's layers do not follow each other: {node.weights[0]}")
    if head is None or len(starts) != graph.num_layers:
        raise UnsupportedError("the model has no layers followed by a final norm")
    return [*starts, head]


def _crossing(graph: Graph, start: int) -> Value:
    """The value that the nodes from ``start`` on take over from those before."""
    made = {value.index for node in graph.nodes[:start] for value in node.outputs}
    found = {
        value.index: value for node in graph.nodes[start:] for value in node.inputs if value.index in made
    }
    if len(found) != 1:
        raise UnsupportedError(
            f"a layer of this model takes over {len(found)} values, not hidden states alone"
        )
    return found.popitem()[1]


def _part(nodes: tuple[Node, ...], taken: Value, output: Value) -> Graph:
    part = [Node("hidden", (), (taken,)), *nodes]
    if not any(node.operator == "select_rows" for node in nodes):
        highest = max(value.index for node in part for value in node.outputs)
        chosen = Value(highest + 1, output.width)
        part.append(Node("select_rows", (output,), (chosen,)))
        output = chosen
    return Graph(tuple(part), output, 1)
