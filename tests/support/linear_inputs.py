"""What the linears of a model read, by the reference device: the plain way to the statistics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.devices.base import BatchItem
from nybble.devices.reference.session import ReferenceSession, _Step
from nybble.graph.graph import Graph
from nybble.models import build_graph

Doubles = npt.NDArray[np.float64]


def linear_inputs(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> dict[str, Doubles]:
    """(tokens, in_features) by the name of each linear's weight, all windows one after another."""
    graph = build_graph(checkpoint)
    # Without the selection of rows every token gets as far as the output matrix.
    found: dict[str, list[npt.NDArray[np.float32]]] = {}
    for window in windows:
        for name, values in _run(graph, checkpoint, window).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(rows).astype(np.float64) for name, rows in found.items()}


def _run(graph: Graph, checkpoint: Checkpoint, window: Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
    seen: dict[str, npt.NDArray[np.float32]] = {}
    original = _Step.run

    def run(step: _Step, node: object) -> None:
        if node.operator == "linear":  # type: ignore[attr-defined]
            seen[node.weights[0]] = step.values[node.inputs[0].index].copy()  # type: ignore[attr-defined]
        original(step, node)  # type: ignore[arg-type]

    session = ReferenceSession(graph, checkpoint.tensors, checkpoint.config.max_position_embeddings)
    _Step.run = run  # type: ignore[method-assign]
    try:
        session.forward([BatchItem(session.new_sequence(), list(window), "all")])
    finally:
        _Step.run = original  # type: ignore[method-assign]
    return seen
