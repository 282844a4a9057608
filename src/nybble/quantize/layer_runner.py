"""LayerRunner: a model run layer by layer over many windows of tokens, on the CPU.

Only one layer's weights are read at a time, and the hidden states of all windows are kept between
layers: a model of any depth needs the memory of one layer. A quantizer collects what a layer's linears
read, replaces their weights, and advances: the next layer then sees what the quantized one gives.

    runner = LayerRunner(checkpoint, windows)
    for layer in range(runner.num_layers):
        statistics = runner.collect(layer, hessian=True)
        runner.replace(quantized_tensors_of(layer, statistics))
        runner.advance(layer)
    statistics = runner.collect(runner.num_layers, hessian=False)  # of the output matrix
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from nybble import _core
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.tensor import Tensor
from nybble.devices.cpu import longest_context
from nybble.devices.cpu.layer_session import LayerSession
from nybble.devices.cpu.lower import Tap
from nybble.errors import Cancelled, DeviceError, NybbleError, UnsupportedError
from nybble.graph.graph import Graph
from nybble.graph.layers import GraphLayers, split_layers
from nybble.models import build_graph
from nybble.quantize.hidden_states import HiddenStates
from nybble.quantize.statistics import InputStatistics, Statistics

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called while a layer runs with the tokens done and all that there are."""

_ROWS = 2048  # tokens handed to the core at once: between two calls progress is told and cancelling seen
_MIRROR = 1024


class LayerRunner:
    """Runs windows through a model one layer after another.

    Args:
        checkpoint: the model; its tensors stay mapped and are used in place.
        windows: token ids of each window, all at least one; windows do not see each other, and each
            begins at position 0.
        threads: threads that compute; default: the cores that this process may use.
        precision: ``fast`` or ``f32``, as for the CPU device. What is summed is float32 in both; ``fast``
            rounds what the linears before it compute with.
        folder: where hidden states go that are too large for memory; default: the system's place.
        progress: called while a layer runs.

    Raises:
        UnsupportedError: the model has LoRA adapters beside its weights, or no plain layers.
        ValueError: a window is empty, longer than the model's context or has a token that is none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Sequence[int] | npt.NDArray[np.integer]],
        *,
        threads: int | None = None,
        precision: str = "fast",
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if checkpoint.adapters:
            raise UnsupportedError(
                f"the model has LoRA adapters beside its weights ({', '.join(checkpoint.adapters)}):"
                " merge them before quantizing"
            )
        if precision not in ("fast", "f32"):
            raise ValueError(f"precision is fast or f32, not {precision!r}")
        if threads is not None and not 1 <= threads <= 1024:
            raise DeviceError(f"threads is between 1 and 1024, not {threads}")
        self._checkpoint = checkpoint
        self._replaced: dict[str, Tensor] = {}
        self._threads = _core.default_threads() if threads is None else threads
        self._precise = precision == "f32"
        self._progress = progress
        self._parts: GraphLayers | None = None
        self._session: LayerSession | None = None
        self._cancelled = False
        self._broken: int | None = None
        self._layer = 0
        ids = [np.asarray(window, np.int64).reshape(-1) for window in windows]
        self._check(ids)
        self._lengths = [len(window) for window in ids]
        parts = self._graphs()
        self._hidden = HiddenStates(sum(self._lengths), parts.hidden_size, folder=folder)
        self._embed(np.concatenate(ids))

    # -- what there is -------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Layers of the model; ``collect(num_layers)`` is about the output matrix."""
        return self._checkpoint.config.num_hidden_layers

    @property
    def layer(self) -> int:
        """The layer whose input is at hand: the only one that can run."""
        return self._layer

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(self._lengths)

    @property
    def hidden(self) -> Floats:
        """(tokens, hidden_size): the input of ``layer``, all windows one after another."""
        return self._hidden.values

    def linears(self, layer: int) -> tuple[str, ...]:
        """Names of the weights of a layer's linears, in the order that they run."""
        graph = self._graph(layer)
        return tuple(node.weights[0] for node in graph.nodes if node.operator == "linear")

    # -- work ----------------------------------------------------------------------------------------

    def collect(
        self, layer: int, *, hessian: bool, weights: Collection[str] | None = None, advance: bool = False
    ) -> Statistics:
        """Runs the windows through one layer with its present weights, and sums what its linears read.

        Args:
            layer: ``self.layer``.
            hessian: sum X^T X too.
            weights: names of the linears that count; None: all.
            advance: keep the hidden states after the layer as well, as ``advance`` does, in the same run.

        Returns:
            Statistics by the name of each linear's weight; linears with the same input share one object.
            The columns of X are those of the weight: where the model gathers columns before a linear,
            the gathered ones.

        Raises:
            NybbleError: hidden states are not finite, or an earlier run stopped halfway.
            Cancelled: ``cancel`` was called.
        """
        wanted = set(self.linears(layer)) if weights is None else set(weights)
        unknown = wanted - set(self.linears(layer))
        if unknown:
            raise ValueError(f"layer {layer} has no linear {', '.join(sorted(unknown))}")
        taps = self._run(layer, tapped=wanted, products=hessian, advance=advance)
        result: dict[str, InputStatistics] = {}
        for tap in taps:
            statistics = self._statistics(layer, tap)
            result.update(dict.fromkeys(tap.weights, statistics))
        return result

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights used from now on in place of the checkpoint's: quantized, rescaled, or new ones.

        Raises:
            FormatError: a tensor does not fit the model.
        """
        before = dict(self._replaced)
        self._replaced.update(tensors)
        self._parts = None
        try:
            self._graphs()
        except BaseException:
            self._replaced = before
            raise

    def advance(self, layer: int) -> None:
        """Runs the windows through ``self.layer``; what comes out is the input of the next one.

        Raises:
            NybbleError: an earlier run stopped halfway.
            Cancelled: ``cancel`` was called: the hidden states are of no use any more.
        """
        self._run(layer, tapped=(), products=False, advance=True)

    def restore(self, layer: int, hidden: Floats) -> None:
        """Goes on from hidden states (tokens, hidden_size) that ``hidden`` gave when ``layer`` was next."""
        if hidden.shape != self.hidden.shape or not 0 <= layer <= self.num_layers:
            raise ValueError(f"hidden states {hidden.shape} of layer {layer} do not fit {self.hidden.shape}")
        self.hidden[:] = hidden
        self._layer, self._broken = layer, None

    def cancel(self) -> None:
        """From any thread: what runs raises Cancelled soon, and so does the next run."""
        self._cancelled = True
        session = self._session
        if session is not None:
            session.cancel()

    def close(self) -> None:
        """Give the hidden states' memory back; the runner is of no use afterwards."""
        self._hidden.close()
        self._replaced.clear()

    def __enter__(self) -> LayerRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- internals -----------------------------------------------------------------------------------

    def _check(self, ids: Sequence[npt.NDArray[np.int64]]) -> None:
        vocabulary, most = self._checkpoint.config.vocab_size, longest_context(self._checkpoint.config)
        if not ids:
            raise ValueError("there are no windows")
        for number, window in enumerate(ids):
            if not 1 <= len(window) <= most:
                raise ValueError(
                    f"window {number} has {len(window)} tokens; the model takes 1 to {most} at a time"
                )
            if window.min() < 0 or window.max() >= vocabulary:
                raise ValueError(f"window {number} has a token outside 0 .. {vocabulary - 1}")

    def _graphs(self) -> GraphLayers:
        if self._parts is None:
            tensors = {**self._checkpoint.tensors, **self._replaced}
            self._parts = split_layers(build_graph(replace(self._checkpoint, tensors=tensors)))
        return self._parts

    def _graph(self, layer: int) -> Graph:
        if not 0 <= layer <= self.num_layers:
            raise ValueError(f"the model has layers 0 to {self.num_layers - 1}, not {layer}")
        parts = self._graphs()
        return parts.head if layer == self.num_layers else parts.layers[layer]

    def _embed(self, ids: npt.NDArray[np.int64]) -> None:
        """Fills the hidden states with the tokens' rows of the embedding; only rows in use are decoded."""
        node = self._graphs().embedding
        tensor = self._tensor(node.weights[0])
        used, place = np.unique(ids, return_inverse=True)
        encoded = tensor.data.reshape(tensor.shape[0], -1)[used]
        rows = tensor.encoding.dequantize(encoded.reshape(-1)).reshape(len(used), -1)
        rows *= np.float32(node.attributes["scale"])
        for begin in range(0, len(ids), _ROWS):
            self.hidden[begin : begin + _ROWS] = rows[place[begin : begin + _ROWS]]

    def _tensor(self, name: str) -> Tensor:
        return self._replaced.get(name) or self._checkpoint.tensors[name]

    def _run(self, layer: int, *, tapped: Collection[str], products: bool, advance: bool) -> list[Tap]:
        if self._broken is not None:
            raise NybbleError(
                f"a run of layer {self._broken} stopped halfway, so that hidden states of two layers are"
                " mixed: make a new LayerRunner"
            )
        if layer != self._layer:
            raise ValueError(
                f"layer {layer} cannot run: the hidden states at hand are those of {self._layer}"
            )
        if advance and layer == self.num_layers:
            raise ValueError("nothing follows the output matrix")
        graph = self._graph(layer)
        names = {name for node in graph.nodes for name in node.weights}
        session = LayerSession(
            graph,
            {name: self._tensor(name) for name in names},
            context_length=longest_context(self._checkpoint.config),
            threads=self._threads,
            precise=self._precise,
            tapped=tapped,
            products=products,
            output=advance,
        )
        self._session = session
        try:
            for first, last, begin in self._batches():
                if self._cancelled:
                    raise Cancelled("the computation was cancelled")
                windows = list(self._windows(first, last, begin))
                result = session.run(windows)
                done = begin + sum(self._lengths[first:last])
                if result is not None:
                    self._broken = layer
                    self.hidden[begin:done] = result
                if self._progress is not None:
                    self._progress(done, self.tokens)
        finally:
            self._session = None
            self._cancelled = False
        if advance:
            self._broken = None
            self._layer += 1
            self._replaced = {
                name: tensor
                for name, tensor in self._replaced.items()
                if not name.startswith(f"model.layers.{layer}.")
            }
        return session.taps

    def _batches(self) -> Iterator[tuple[int, int, int]]:
        """First and last window of each call of the core, and the first one's first token."""
        first = begin = rows = 0
        for number, length in enumerate(self._lengths):
            rows += length
            if rows >= _ROWS or number + 1 == len(self._lengths):
                yield first, number + 1, begin
                first, begin, rows = number + 1, begin + rows, 0

    def _windows(self, first: int, last: int, begin: int) -> Iterator[Floats]:
        for length in self._lengths[first:last]:
            yield self.hidden[begin : begin + length]
            begin += length

    def _statistics(self, layer: int, tap: Tap) -> InputStatistics:
        if not np.isfinite(tap.sum_squares).all():
            raise NybbleError(
                f"layer {layer}: the input of {tap.weights[0]} is not finite; the model's weights or its"
                " config are broken"
            )
        if tap.products is not None:
            mirror(tap.products)
        return InputStatistics(self.tokens, tap.sum_squares, tap.sum_absolute, tap.products)


def mirror(matrix: Floats) -> None:
    """Copies what is above the diagonal of a square matrix below it, in place."""
    n = len(matrix)
    for begin in range(0, n, _MIRROR):
        end = min(n, begin + _MIRROR)
        matrix[end:, begin:end] = matrix[begin:end, end:].T
        block = matrix[begin:end, begin:end]
        below = np.tril_indices(end - begin, -1)
        block[below] = block.T[below]
