"""Lowering: from steps to the native plan: weights, buffers by lifetime, KV groups, rotary tables."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble import _core
from nybble.checkpoint.config import RopeConfig
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.devices.cpu.affine_weights import native_weight
from nybble.devices.cpu.fuse import OUTPUT, Fuser
from nybble.devices.cpu.steps import (
    AttentionStep,
    ElementwiseStep,
    EmbeddingStep,
    GatherColumnsStep,
    HiddenStep,
    LinearStep,
    NormStep,
    NormWeights,
    Place,
    ScaleBySequenceStep,
    SelectStep,
    Step,
    TapStep,
)
from nybble.errors import UnsupportedError
from nybble.graph.graph import Graph
from nybble.graph.rotary import rotary_frequencies

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NO_PLACE = (_core.NONE, 0)
NO_NORM = (_core.NONE, 0.0, 0.0)


@dataclass
class Tap:
    """The sums of a tap; the plan's runs add to them."""

    weights: tuple[str, ...]
    """The linears that read what is summed."""
    sum_squares: Doubles
    """(columns,)"""
    sum_absolute: Doubles
    """(columns,)"""
    products: Floats | None
    """(columns, columns): products of every two columns, right only on and above the diagonal."""


class Lowering:
    """Builds one plan.

    ``keep_alive`` are the arrays that the plan points into; ``threads`` make them. ``taps`` are those
    that it writes; with ``products`` they sum the products of every two columns as well.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Tensor],
        context_length: int,
        *,
        adapters: int = 0,
        threads: int = 1,
        products: bool = False,
    ) -> None:
        self._graph = graph
        self._tensors = tensors
        self._context_length = context_length
        self._threads = threads
        self.plan = _core.Plan()
        self.plan.vocab_size = graph.output.width
        self.plan.context_length = context_length
        self.plan.adapters = adapters
        self.keep_alive: list[object] = []
        self.taps: list[Tap] = []
        self._products = products
        self._weights: dict[str, int] = {}
        self._converted: dict[str, Tensor] = {}
        self._vectors: dict[tuple[str, int], int] = {}
        self._permutations: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._ropes: dict[RopeConfig, int] = {}
        self._groups: dict[tuple[int, int, int], tuple[int, dict[int, int]]] = {}
        self._buffers: list[int] = []
        self._offsets: dict[int, int] = {}

    def run(self) -> _core.Plan:
        """The finished, validated plan."""
        fuser = Fuser(self._graph, self._tensors)
        steps = fuser.run()
        return self.lower(steps, fuser.widths)

    def lower(self, steps: list[Step], widths: list[int]) -> _core.Plan:
        """The finished, validated plan of some steps; ``widths`` are the columns of their storages."""
        self._assign_buffers(steps, widths)
        self._make_groups(steps)
        self._convert_affine(steps)
        for step in steps:
            self._emit(step)
        self.plan.validate()
        return self.plan

    # -- buffers -----------------------------------------------------------------------------------

    def _assign_buffers(self, steps: list[Step], widths: list[int]) -> None:
        """One buffer serves several storages, one after another: first written to last read.

        Attention may write over its queries, and a residual add over what it adds to: every task
        reads there exactly what it writes. Other outputs are kept apart from inputs.
        """
        last_use: dict[int, int] = {}
        for index, step in enumerate(steps):
            for place in (*step.reads(), *step.writes()):
                last_use[place.storage] = index
        self._buffers = [-1] * len(widths)
        sizes: list[int] = []
        selected: list[bool] = []
        free: list[int] = []
        live: set[int] = set()
        for index, step in enumerate(steps):
            for place in step.writes():
                storage = place.storage
                if storage == OUTPUT or self._buffers[storage] >= 0:
                    continue
                over = _overwritable(step)
                fitting = [b for b in free if selected[b] == step.selected]
                if over is not None and over.storage in live and last_use[over.storage] == index:
                    # The storage passes on; its buffer and column offset stay.
                    live.remove(over.storage)
                    self._buffers[storage] = self._buffers[over.storage]
                    self._offsets[storage] = self._offsets.get(over.storage, 0) + over.offset
                elif fitting:
                    # The smallest that is wide enough, or the widest, made wider.
                    buffer = min(
                        fitting, key=lambda b: (sizes[b] < widths[storage], abs(sizes[b] - widths[storage]))
                    )
                    free.remove(buffer)
                    sizes[buffer] = max(sizes[buffer], widths[storage])
                    self._buffers[storage] = buffer
                else:
                    self._buffers[storage] = len(sizes)
                    sizes.append(widths[storage])
                    selected.append(step.selected)
                live.add(storage)
            for storage in [s for s in live if last_use[s] == index]:
                live.remove(storage)
                free.append(self._buffers[storage])
        for size, only_selected in zip(sizes, selected, strict=True):
            self.plan.add_buffer(size, only_selected)

    def _view(self, place: Place | None) -> tuple[int, int]:
        if place is None:
            return NO_PLACE
        if place.storage == OUTPUT:
            return (_core.OUTPUT, place.offset)
        return (self._buffers[place.storage], self._offsets.get(place.storage, 0) + place.offset)

    # -- constants ---------------------------------------------------------------------------------

    def _convert_affine(self, steps: list[Step]) -> None:
        """Affine weights, several at a time: NumPy and the core let other threads run."""
        names = {part.weight for step in steps if isinstance(step, LinearStep) for part in step.parts}
        names |= {step.weight for step in steps if isinstance(step, EmbeddingStep)}
        affine = [name for name in sorted(names) if affine_format(self._tensors[name].encoding.name)]
        if affine:
            with ThreadPoolExecutor(self._threads) as pool:
                converted = pool.map(native_weight, [self._tensors[name] for name in affine])
                self._converted = dict(zip(affine, converted, strict=True))

    def _weight(self, name: str) -> int:
        index = self._weights.get(name)
        if index is None:
            tensor = self._converted.pop(name, None) or self._tensors[name]
            rows, columns = tensor.shape
            data = np.ascontiguousarray(tensor.data)
            self.keep_alive.append(data)
            try:
                index = self.plan.add_weight(tensor.encoding.name, rows, columns, data)
            except ValueError as error:
                raise UnsupportedError(f"{name}: {error}") from None
            self._weights[name] = index
        return index

    def _vector(self, name: str | None, offset: int = 0) -> int:
        if name is None:
            return int(_core.NONE)
        index = self._vectors.get((name, offset))
        if index is None:
            values = np.ascontiguousarray(self._tensors[name].dequantize(), dtype=np.float32).reshape(-1)[
                offset:
            ]
            index = self.plan.add_vector(np.ascontiguousarray(values))
            self._vectors[name, offset] = index
        return index

    def _permutation(self, name: str) -> int:
        index = self._permutations.get(name)
        if index is None:
            columns = np.ascontiguousarray(self._tensors[name].data).view("<i4")
            index = self._permutations[name] = self.plan.add_permutation(columns)
        return index

    def _slot(self, name: str) -> int:
        index = self._slots.get(name)
        if index is None:
            slots = np.ascontiguousarray(self._tensors[name].data).view("<i4")
            index = self._slots[name] = self.plan.add_slots(slots)
        return index

    def _norm(self, norm: NormWeights | None) -> tuple[int, float, float]:
        return NO_NORM if norm is None else (self._vector(norm.weight), norm.eps, norm.offset)

    def _rope(self, rope: RopeConfig | None) -> int:
        if rope is None:
            return int(_core.NONE)
        index = self._ropes.get(rope)
        if index is None:
            short, short_factor = rotary_frequencies(rope, 1)
            long, long_factor = rotary_frequencies(rope, self._context_length)
            index = self.plan.add_rope(
                rope.rotary_dim,
                rope.interleaved,
                np.ascontiguousarray(short, dtype=np.float32),
                short_factor,
                np.ascontiguousarray(long, dtype=np.float32),
                long_factor,
            )
            self._ropes[rope] = index
        return index

    def _tap(self, step: TapStep) -> int:
        n = step.columns
        products = np.zeros((n, n), np.float32) if self._products else None
        tap = Tap(step.weights, np.zeros(n), np.zeros(n), products)
        self.taps.append(tap)
        return int(self.plan.add_tap(tap.sum_squares, tap.sum_absolute, tap.products))

    # -- KV groups ---------------------------------------------------------------------------------

    def _window(self, step: AttentionStep) -> int:
        """0 where the window never hides anything."""
        return 0 if step.window is None or step.window >= self._context_length else step.window

    def _make_groups(self, steps: list[Step]) -> None:
        layers: dict[tuple[int, int, int], list[int]] = {}
        for step in steps:
            if isinstance(step, AttentionStep):
                layers.setdefault((self._window(step), step.kv_heads, step.head_dim), []).append(step.layer)
        for key, members in layers.items():
            index = self.plan.add_kv_group(key[0], len(members), key[1], key[2])
            self._groups[key] = (index, {layer: i for i, layer in enumerate(members)})

    # -- steps -------------------------------------------------------------------------------------

    def _emit(self, step: Step) -> None:
        plan, view = self.plan, self._view
        if isinstance(step, EmbeddingStep):
            plan.embedding(self._weight(step.weight), step.scale, view(step.out))
        elif isinstance(step, NormStep):
            plan.norm(
                self._norm(step.norm), view(step.x), view(step.out), step.width, step.group, step.selected
            )
        elif isinstance(step, LinearStep):
            parts = [
                (
                    self._weight(part.weight),
                    part.row,
                    part.rows,
                    view(part.out),
                    self._vector(part.bias, part.bias_offset),
                    view(part.residual),
                )
                for part in step.parts
            ]
            plan.linear(
                view(step.x),
                step.columns,
                self._norm(step.norm),
                step.gated is not None,
                step.gated or "silu",
                parts,
                step.selected,
            )
        elif isinstance(step, AttentionStep):
            window = self._window(step)
            group, members = self._groups[window, step.kv_heads, step.head_dim]
            plan.attention(
                view(step.q),
                view(step.k),
                view(step.v),
                view(step.out),
                step.heads,
                step.kv_heads,
                step.head_dim,
                group,
                members[step.layer],
                window,
                step.scale,
                step.softcap or 0.0,
                self._norm(step.q_norm),
                self._norm(step.k_norm),
                self._rope(step.rope),
            )
        elif isinstance(step, GatherColumnsStep):
            permutation = self._permutation(step.permutation)
            plan.gather_columns(view(step.x), view(step.out), step.width, permutation, step.selected)
        elif isinstance(step, ScaleBySequenceStep):
            slots, scales = self._slot(step.slots), self._vector(step.scales)
            plan.scale_by_sequence(
                view(step.x), view(step.out), step.width, step.out_width, slots, scales, step.selected
            )
        elif isinstance(step, HiddenStep):
            plan.hidden(view(step.out))
        elif isinstance(step, TapStep):
            norm, tap = self._norm(step.norm), self._tap(step)
            plan.tap(view(step.x), step.columns, norm, tap, step.selected)
        elif isinstance(step, SelectStep):
            plan.select(view(step.x), view(step.out), step.width)
        elif isinstance(step, ElementwiseStep):
            self._elementwise(step)

    def _elementwise(self, step: ElementwiseStep) -> None:
        plan, view = self.plan, self._view
        a, b, out = view(step.a), view(step.b), view(step.out)
        if step.kind == "add":
            plan.add(a, b, out, step.width, step.selected)
        elif step.kind == "scale":
            plan.scale(a, out, step.width, step.factor, step.selected)
        elif step.kind == "softcap":
            plan.softcap(a, out, step.width, step.factor, step.selected)
        else:
            plan.gated(a, b, out, step.width, step.activation, step.selected)


def _overwritable(step: Step) -> Place | None:
    """An input whose place the step's only output may take."""
    if isinstance(step, AttentionStep):
        return step.q
    if isinstance(step, LinearStep) and len(step.parts) == 1:
        return step.parts[0].residual
    if isinstance(step, ElementwiseStep):
        return step.a
    if isinstance(step, ScaleBySequenceStep) and step.width == step.out_width:
        return step.x
    return None
