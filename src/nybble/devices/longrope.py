"""When a sequence crosses LongRoPE's limit, its cached keys are no longer right: what to run then.

Keys in the cache were rotated with the short divisors or with the long ones, by the length that
the sequence had. Growing past the limit (or being cut back below it) changes the divisors for all
positions, so the whole sequence must run again. Every device asks ``plan_run`` before it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.checkpoint.config import RopeConfig
from nybble.errors import UnsupportedError
from nybble.graph.graph import Graph
from nybble.graph.rotary import is_long


@dataclass(frozen=True)
class Run:
    """What one sequence must run.

    ``tokens`` go to positions ``start`` and on; keys from ``start`` on are to be dropped first.
    The last tokens are the new ones; the first ``repeated`` ran before, and nobody asks for their
    logits. ``long`` says which divisors rotate them.
    """

    tokens: Sequence[int]
    start: int
    repeated: int
    long: bool


def longrope_of(graph: Graph) -> RopeConfig | None:
    """The LongRoPE of a graph; None where no layer has one.

    Raises:
        UnsupportedError: layers switch at different lengths.
    """
    found: RopeConfig | None = None
    for node in graph.nodes:
        rope = node.attributes.get("rope")
        if not isinstance(rope, RopeConfig) or rope.kind != "longrope":
            continue
        if found is not None and (
            found.original_max_position_embeddings != rope.original_max_position_embeddings
        ):
            raise UnsupportedError("layers whose LongRoPE switches at different lengths are not supported")
        found = rope
    return found


def plan_run(rope: RopeConfig | None, cached: Sequence[int], cached_long: bool, new: Sequence[int]) -> Run:
    """What to run so that ``new`` follows ``cached``.

    ``rope`` is ``longrope_of(graph)``; ``cached_long`` is the ``long`` of the run that made the
    cache (any value where the cache is empty).
    """
    if rope is None:
        return Run(new, len(cached), 0, False)
    long = is_long(rope, len(cached) + len(new))
    if cached and long != cached_long:
        return Run([*cached, *new], 0, len(cached), long)
    return Run(new, len(cached), 0, long)
