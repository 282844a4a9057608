"""One layer of a model on the CPU: hidden states in, hidden states out, and what its linears read.

The plan is that of a whole model cut to the layer (``graph/layers.py``), with a tap before each linear
whose input is to be summed. Where nobody wants the layer's output, what follows the last tap is left
out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nybble import _core
from nybble.checkpoint.tensor import Tensor
from nybble.devices.cpu.fuse import Fuser
from nybble.devices.cpu.lower import Lowering, Tap
from nybble.devices.cpu.steps import LinearStep, Step, TapStep
from nybble.devices.longrope import longrope_of
from nybble.errors import Cancelled
from nybble.graph.graph import Graph
from nybble.graph.rotary import is_long

Floats = npt.NDArray[np.float32]

MAX_ROWS = 512
"""Tokens worked on at a time: weights are dequantized once for so many, and products of columns summed."""


class LayerSession:
    """A layer, or the final norm and output matrix, ready to run.

    Args:
        graph: a part of ``split_layers``.
        tensors: the weights by name.
        context_length: what the model's rotary tables and windows are made for.
        threads: threads that compute.
        precise: float32 weights and activations everywhere.
        tapped: the linears whose input is summed, by the name of their weight.
        products: sum the products of every two columns too.
        output: whether ``run`` gives the hidden states after the layer.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        *,
        context_length: int,
        threads: int,
        precise: bool,
        tapped: Collection[str],
        products: bool,
        output: bool,
    ) -> None:
        fuser = Fuser(graph, tensors)
        steps = with_taps(fuser.run(), tapped)
        if not output:
            taps = [index for index, step in enumerate(steps) if isinstance(step, TapStep)]
            steps = steps[: taps[-1] + 1] if taps else []
        self._lowering = Lowering(graph, tensors, context_length, threads=threads, products=products)
        self._plan = self._lowering.plan
        self._plan.hidden_size = graph.nodes[0].outputs[0].width
        if not output:
            self._plan.vocab_size = 1  # nothing is written there
        self._lowering.lower(steps, fuser.widths)
        self._output = output
        self._longrope = longrope_of(graph)
        self._native = _core.make_session(self._plan, threads, "f32", 0, MAX_ROWS, precise)
        self._sequences: list[_core.Sequence] = []

    @property
    def taps(self) -> list[Tap]:
        """The sums over everything that ran, one for each input that linears have in common."""
        return self._lowering.taps

    def run(self, windows: Sequence[Floats]) -> Floats | None:
        """Runs windows (tokens, hidden_size), each a sequence of its own that begins at position 0.

        Returns:
            The hidden states after the layer, all windows' rows one after another; None where they
            were not wanted.

        Raises:
            Cancelled: ``cancel`` was called.
        """
        while len(self._sequences) < len(windows):
            self._sequences.append(self._native.new_sequence())
        items = [
            (sequence, window, int(self._longrope is not None and is_long(self._longrope, len(window))))
            for sequence, window in zip(self._sequences, windows, strict=False)
        ]
        rows = sum(len(window) for window in windows)
        result = np.empty((rows, self._plan.vocab_size), np.float32)
        try:
            self._native.forward_hidden(items, result)
        except _core.ForwardCancelled:
            raise Cancelled("the computation was cancelled") from None
        finally:
            for sequence in self._sequences:
                sequence.clear()
        return result if self._output else None

    def cancel(self) -> None:
        """From any thread: a running ``run`` raises Cancelled soon."""
        self._native.cancel()


def with_taps(steps: Sequence[Step], tapped: Collection[str]) -> list[Step]:
    """The steps with a tap before each linear of ``tapped``."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, LinearStep):
            weights = tuple(dict.fromkeys(part.weight for part in step.parts if part.weight in tapped))
            if weights:
                result.append(TapStep(step.x, step.columns, step.norm, weights, selected=step.selected))
        result.append(step)
    return result
