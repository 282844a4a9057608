"""A graph cut into layers: nothing lost, nothing twice, hidden states alone from one to the next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nybble.errors import UnsupportedError
from nybble.graph.graph import Graph, GraphBuilder
from nybble.graph.layers import split_layers
from nybble.models import build_graph
from support.random_checkpoints import FAMILIES, LLAMA, random_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_is_in_one_part(family: str) -> None:
    config = FAMILIES[family]
    graph = build_graph(random_checkpoint(config))
    parts = split_layers(graph)
    assert parts.embedding is graph.nodes[0]
    assert parts.hidden_size == config.hidden_size
    assert len(parts.layers) == config.num_hidden_layers
    found = [node for part in (*parts.layers, parts.head) for node in part.nodes[1:] if node in graph.nodes]
    assert found == list(graph.nodes[1:])
    for number, part in enumerate(parts.layers):
        assert part.nodes[0].operator == "hidden"
        assert part.output.width == config.hidden_size
        assert [n.attributes["layer"] for n in part.nodes if n.operator == "attention"] == [number]
        made = {value.index for node in part.nodes for value in node.outputs}
        assert all(value.index in made for node in part.nodes for value in node.inputs)
    assert parts.head.output.width == config.vocab_size


def test_models_of_another_build_are_refused() -> None:
    checkpoint = random_checkpoint(LLAMA)
    builder = GraphBuilder(checkpoint.tensors)
    x = builder.embedding("model.embed_tokens.weight")
    scaled = builder.finish(builder.scale(x, 2.0))
    with pytest.raises(UnsupportedError, match="no layers followed by a final norm"):
        split_layers(scaled)
    graph = build_graph(checkpoint)
    swapped = Graph((*graph.nodes[:1], *graph.nodes[20:], *graph.nodes[1:20]), graph.output, 3)
    with pytest.raises(UnsupportedError, match="do not follow each other"):
        split_layers(swapped)
    last = graph.nodes[-1]
    skip = replace(graph.nodes[-4], inputs=(graph.nodes[0].outputs[0], *graph.nodes[-4].inputs[1:]))
    with pytest.raises(UnsupportedError, match="takes over 2 values"):
        split_layers(Graph((*graph.nodes[:-4], skip, *graph.nodes[-3:-1], last), graph.output, 3))
