"""LayerQuantizer: a model's matrices rounded one layer after another, each layer seeing what the ones before
it give once they are quantized.

For each layer: run the calibration text through it and sum what its linears read; choose AWQ's scales group
by group and fold them into what comes before; round every linear; put the results in the layer's place and
run the text through it again. Only one layer is in memory, as float32, and the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.convert.errors import ValueErrors
from nybble.convert.made import MadeTensor
from nybble.convert.rules import OUTPUT
from nybble.models import build_graph
from nybble.quantize.awq import scaled, search_scales
from nybble.quantize.blocks import quantize_blocks
from nybble.quantize.folding import ScaleGroup, fold, plan_folding
from nybble.quantize.gptq import GptqFactor, factorize
from nybble.quantize.layer_runner import LayerRunner
from nybble.quantize.matrices import form_of, made_of, round_matrix, round_plainly, with_feedback
from nybble.quantize.rtn import round_rtn
from nybble.quantize.statistics import InputStatistics

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Method:
    """How matrices are rounded with what calibration saw."""

    scales: bool
    """AWQ's scales."""
    feedback: bool
    """GPTQ's error feedback."""

    @classmethod
    def named(cls, name: str) -> Method:
        """One of ``recipe.METHODS``."""
        return cls("awq" in name, "gptq" in name)


class LayerQuantizer:
    """Rounds layer by layer with calibration.

    Args:
        checkpoint: the model.
        encodings: what matrices become, by name; those that are not named stay as they are.
        method: how.
        runner: with the calibration's windows.
        threads: at most; None: the cores that this process may use.
        progress: called with the share of the layer that is done, 0 to 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        encodings: Mapping[str, str],
        method: Method,
        runner: LayerRunner,
        *,
        threads: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._encodings = encodings
        self._method = method
        self._runner = runner
        self._threads = threads
        self._progress = progress
        self._plan = plan_folding(build_graph(checkpoint)) if method.scales else None

    def quantize(self, layer: int) -> dict[str, MadeTensor]:
        """The tensors of a layer that change; ``num_layers``: of the output matrix.

        The runner must be at this layer; afterwards ``advance`` takes it to the next one.
        """
        wanted = [name for name in self._runner.linears(layer) if name in self._encodings]
        if not wanted:
            return {}
        # The matrix of tied embeddings is looked up in too: nothing is fed back into its rows.
        tied = layer == self._runner.num_layers and OUTPUT not in wanted
        statistics = dict(self._runner.collect(layer, hessian=not tied))
        changed: dict[str, Tensor] = {}
        scaled_ones: set[str] = set()
        if self._plan is not None and not tied:
            for group in self._plan.groups:
                if group.linears[0] in statistics:
                    changed |= self._scaled(group, statistics, changed, scaled_ones)
        made: dict[str, MadeTensor] = {}
        factors: dict[tuple[int, bool], GptqFactor] = {}
        for number, name in enumerate(wanted):
            tensor = changed.get(name, self._checkpoint.tensors[name])
            if encoding(self._encodings[name]).block_size == 1:
                continue  # a number without a block: the conversion rounds it, scaled or not
            changed.pop(name, None)
            made |= self._rounded(tensor, statistics[name], factors, name in scaled_ones, plainly=tied)
            if self._progress is not None:
                self._progress((number + 1) / len(wanted))
        for name, tensor in changed.items():
            how = "multiplied by scales (awq)" if name in statistics else "divided by scales (awq)"
            made[name] = MadeTensor(tensor, how, ValueErrors())
        return made

    def advance(self, layer: int, made: Mapping[str, MadeTensor]) -> None:
        """Runs the text through the layer as it is now."""
        self._runner.replace({name: item.tensor for name, item in made.items()})
        self._runner.advance(layer)

    # -- internals -----------------------------------------------------------------------------------

    def _scaled(
        self,
        group: ScaleGroup,
        statistics: dict[str, InputStatistics],
        changed: Mapping[str, Tensor],
        scaled_ones: set[str],
    ) -> dict[str, Tensor]:
        """What AWQ's scales of a group change; its statistics become those of the divided inputs."""
        names = [self._encodings[name] for name in group.linears if name in self._encodings]
        blocks = [name for name in names if encoding(name).block_size > 1]
        if not blocks:
            return {}
        # Matrices of a group share their scales: those for the one with the fewest bits are for all.
        coarsest = min(blocks, key=lambda name: encoding(name).bits_per_weight)
        tensors = {**self._checkpoint.tensors, **changed}
        seen = statistics[group.linears[0]]
        kind, form = encoding(coarsest), form_of(coarsest)

        def rounded(values: Floats) -> Floats:
            if form is not None:
                return round_rtn(values, form, clipping=False, threads=self._threads)
            data = quantize_blocks(values, coarsest, threads=self._threads)
            return kind.dequantize(data).reshape(values.shape)

        weights = [tensors[name].dequantize() for name in group.linears]
        found = search_scales(weights, seen, rounded, source=group.source)
        if found.ratio == 0:
            return {}
        scaled_ones.update(group.linears)
        statistics.update(dict.fromkeys(group.linears, scaled(seen, found.scales[group.source])))
        return fold(group, found.scales, tensors)

    def _rounded(
        self,
        tensor: Tensor,
        seen: InputStatistics,
        factors: dict[tuple[int, bool], GptqFactor],
        is_scaled: bool,
        *,
        plainly: bool,
    ) -> dict[str, MadeTensor]:
        name = self._encodings[tensor.name]
        if plainly:
            return {tensor.name: round_plainly(tensor, name, seen.mean_squares)}
        values = tensor.dequantize()
        before = "awq, " if is_scaled else ""

        def factor(act_order: bool) -> GptqFactor:
            key = (id(seen), act_order)
            if key not in factors:
                assert seen.hessian is not None
                factors[key] = factorize(seen.hessian, act_order=act_order)
            return factors[key]

        if not self._method.feedback:
            data = round_matrix(values, name, importance=seen.mean_squares, threads=self._threads)
            return {tensor.name: made_of(tensor, values, name, data, f"quantized: {before}weighted")}
        data, how = with_feedback(values, name, seen, factor, threads=self._threads)
        return {tensor.name: made_of(tensor, values, name, data, f"quantized: {before}{how}")}
