"""What a sequence must run when it crosses LongRoPE's limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nybble.devices.longrope import Run, longrope_of, plan_run
from nybble.errors import UnsupportedError
from nybble.graph import Graph
from nybble.models import build_graph
from support.tiny_models import LLAMA, PHI3, tiny_checkpoint

ROPE = PHI3.rope  # switches after 16 tokens


def test_without_longrope_only_new_tokens_run() -> None:
    assert plan_run(None, [1, 2, 3], False, [4]) == Run([4], 3, 0, False)


@pytest.mark.parametrize(
    ("cached", "cached_long", "new", "repeats", "long"),
    [
        (0, False, 16, False, False),
        (0, False, 17, False, True),
        (15, False, 1, False, False),
        (16, False, 1, True, True),
        (10, False, 40, True, True),
        (17, True, 1, False, True),
        (5, True, 1, True, False),  # cut back below the limit
        (0, True, 1, False, False),  # nothing cached: nothing to repeat
    ],
)
def test_crossing_runs_the_whole_sequence_again(
    cached: int, cached_long: bool, new: int, repeats: bool, long: bool
) -> None:
    old, tokens = list(range(cached)), list(range(100, 100 + new))
    run = plan_run(ROPE, old, cached_long, tokens)
    assert run.long == long
    if repeats:
        assert (list(run.tokens), run.start, run.repeated) == (old + tokens, 0, cached)
    else:
        assert (list(run.tokens), run.start, run.repeated) == (tokens, cached, 0)


def test_longrope_of_a_graph() -> None:
    graph = build_graph(tiny_checkpoint(PHI3))
    assert longrope_of(graph) == ROPE
    assert longrope_of(build_graph(tiny_checkpoint(LLAMA))) is None
    other = [
        replace(n, attributes={**n.attributes, "rope": replace(ROPE, original_max_position_embeddings=9)})
        for n in graph.nodes
        if n.operator == "rotary"
    ]
    with pytest.raises(UnsupportedError, match="different lengths"):
        longrope_of(Graph((*graph.nodes, *other), graph.output, graph.num_layers))
