"""What a name in the graph stands for while it is recognised: a number, a weight or an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import UnsupportedError

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

MAX_KNOWN = 1 << 25
"""Elements of an array that is computed while recognising."""


@dataclass(frozen=True, eq=False)
class Known:
    """An array that is computed: float32, int64 or bool, whatever type the file has."""

    array: Array


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored array with what was done to it; ``load`` makes it in its storage type.

    ``key`` is equal for two weights that hold the same numbers in the same order, whatever their shapes.
    """

    shape: tuple[int, ...]
    element: str
    load: Callable[[], Array]
    key: tuple[object, ...]
    is_view: bool = True
    """Whether ``load`` gives the file's own bytes."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def transposed(self, order: tuple[int, ...]) -> Weight:
        """Axes in another order, bit for bit."""
        shape = tuple(self.shape[axis] for axis in order)
        if order == tuple(range(len(order))):
            return self
        if self.key[0] == "transposed" and order == (1, 0):
            original = self.key[1]
            assert isinstance(original, Weight)
            if original.shape == shape:  # else it was reshaped since
                return original
        return Weight(
            shape,
            self.element,
            lambda: np.ascontiguousarray(self.load().transpose(order)),
            ("transposed", self) if order == (1, 0) else ("order", order, *self.key),
            False,
        )

    def reshaped(self, shape: tuple[int, ...]) -> Weight:
        """The same elements in another shape."""
        return Weight(shape, self.element, lambda: self.load().reshape(shape), self.key, self.is_view)

    def rows(self, begin: int, end: int) -> Weight:
        """Rows ``begin .. end`` of a matrix or vector."""
        if (begin, end) == (0, self.shape[0]):
            return self
        return Weight(
            (end - begin, *self.shape[1:]),
            self.element,
            lambda: self.load()[begin:end],
            ("rows", begin, end, *self.key),
            self.is_view,
        )

    def columns(self, begin: int, end: int) -> Weight:
        """Columns of a matrix."""
        if (begin, end) == (0, self.shape[1]):
            return self
        return Weight(
            (self.shape[0], end - begin),
            self.element,
            lambda: np.ascontiguousarray(self.load()[:, begin:end]),
            ("columns", begin, end, *self.key),
            False,
        )

    def known(self) -> Array:
        """The values, computed: float32 for floats, int64 for integers."""
        if self.size > MAX_KNOWN:
            raise UnsupportedError(
                f"an array of shape {self.shape} is too large to be part of a mask or table"
            )
        return as_known(self.load(), self.element)


def as_known(array: Array, element: str) -> Array:
    """A stored array as float32, int64 or bool."""
    if element == "bf16":
        return np.asarray((array.astype(np.uint32) << np.uint32(16)).view(np.float32))
    if element == "bool":
        return array.astype(np.bool_)
    wanted = np.float32 if element in ("f16", "f32", "f64") else np.int64
    return np.asarray(array, wanted)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix of codes with a scale, and perhaps a zero point or a minimum, for each group along one axis.

    ``codes()`` uint8 (shape), ``scales()`` in storage type and ``zero_points()`` uint8, both with
    ``axis`` divided by the group size (rounded up). value = (code - zero point) * scale.
    """

    shape: tuple[int, int]
    bits: int
    axis: int
    group_size: int
    scale: str
    codes: Callable[[], Array]
    scales: Callable[[], Array]
    zero_points: Callable[[], Array] | None
    key: tuple[object, ...]
    packed: Callable[[], Array] | None = None
    """Codes (rows, groups, bytes of a group), lowest bits first, where the file has whole groups so."""
    minima: Callable[[], Array] | None = None
    """As the scales, in their type; value = code * scale + minimum, and there are no zero points."""

    def transposed(self) -> Quantized:
        """Rows and columns exchanged."""
        zero, minima = self.zero_points, self.minima
        return replace(
            self,
            shape=(self.shape[1], self.shape[0]),
            axis=1 - self.axis,
            codes=lambda: self.codes().T,
            scales=lambda: self.scales().T,
            zero_points=None if zero is None else lambda: zero().T,
            minima=None if minima is None else lambda: minima().T,
            key=self.key[1:] if self.key[0] == "T" else ("T", *self.key),
            packed=None,
        )

    def rows(self, begin: int, end: int) -> Quantized:
        """Some rows of a matrix whose groups lie along its rows."""
        if (begin, end) == (0, self.shape[0]):
            return self
        assert self.axis == 1
        zero, packed, minima = self.zero_points, self.packed, self.minima
        return replace(
            self,
            shape=(end - begin, self.shape[1]),
            codes=lambda: self.codes()[begin:end],
            scales=lambda: self.scales()[begin:end],
            zero_points=None if zero is None else lambda: zero()[begin:end],
            minima=None if minima is None else lambda: minima()[begin:end],
            key=("rows", begin, end, *self.key),
            packed=None if packed is None else lambda: packed()[begin:end],
        )

    def columns(self, begin: int, end: int) -> Quantized:
        """The first columns: padding of the last group cut off."""
        if (begin, end) == (0, self.shape[1]):
            return self
        if begin or self.axis != 1:
            raise UnsupportedError("a slice of a quantized matrix that begins within a row")
        groups = -(-end // self.group_size)
        zero, minima = self.zero_points, self.minima
        return replace(
            self,
            shape=(self.shape[0], end),
            codes=lambda: self.codes()[:, :end],
            scales=lambda: self.scales()[:, :groups],
            zero_points=None if zero is None else lambda: zero()[:, :groups],
            minima=None if minima is None else lambda: minima()[:, :groups],
            key=("columns", begin, end, *self.key),
            packed=None,
        )


@dataclass(frozen=True, eq=False)
class Centres:
    """minimum + middle * scale of the groups of a matrix, kept apart: (groups, rows), or (rows, groups)."""

    minima: Weight
    scales: Weight
    middle: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.minima.shape

    def transposed(self) -> Centres:
        """Rows and groups exchanged."""
        return replace(self, minima=self.minima.transposed((1, 0)), scales=self.scales.transposed((1, 0)))


Stored = Weight | Quantized

ELEMENTWISE = frozenset(
    {
        "add", "sub", "mul", "div", "Tanh", "Sigmoid", "Erf", "Exp", "Neg", "Abs", "Sqrt", "Reciprocal",
        "silu", "gelu", "gelu_pytorch_tanh", "scale", "shift", "power", "over",
    }
)  # fmt: skip
"""Operators of terms that work on each element by itself."""


@dataclass(eq=False)
class Term:
    """One step of the model: an operator on other terms.

    ``shape`` is canonical: (1, tokens, width) for activations. ``node`` names the ONNX node.
    """

    operator: str
    args: tuple[Term, ...]
    shape: tuple[int, ...]
    node: str
    values: dict[str, Any] = field(default_factory=dict)
    made: dict[object, Term] = field(default_factory=dict)
    """Slices and multiples, so that asking twice gives the same term."""

    @property
    def width(self) -> int:
        """Features a token."""
        return self.shape[-1]

    def slice(self, begin: int, end: int) -> Term:
        """A column range; the same object each time."""
        if (begin, end) == (0, self.width):
            return self
        if self.operator == "slice":
            start = self.values["begin"]
            return self.args[0].slice(start + begin, start + end)
        found = self.made.get((begin, end))
        if found is None:
            shape = (*self.shape[:-1], end - begin)
            if self.operator in ELEMENTWISE:  # a slice of a function is the function of a slice
                args = tuple(arg.slice(begin, end) for arg in self.args)
                found = Term(self.operator, args, shape, self.node, self.values)
            else:
                found = Term("slice", (self,), shape, self.node, {"begin": begin, "end": end})
            self.made[(begin, end)] = found
        return found

    def scaled(self, factor: float) -> Term:
        """Times a number; the same object each time."""
        if factor == 1.0:
            return self
        found = self.made.get(factor)
        if found is None:
            found = self.made[factor] = Term("scale", (self,), self.shape, self.node, {"factor": factor})
        return found


Part = tuple[Indices, Array | None]
"""For each element of a view: which element of the base, times what."""


class View:
    """An activation: elements of a term in some order, perhaps sums of a few of them, times a number."""

    def __init__(
        self,
        base: Term,
        shape: tuple[int, ...],
        make: Callable[[], list[Part]] | None = None,
        gain: float = 1.0,
        sources: tuple[str, ...] = (),
    ) -> None:
        self.base = base
        self.sources = sources
        """Names of the arrays that elements are multiplied by."""
        self.shape = shape
        self.gain = gain
        self._make = make
        self._parts: list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        """What each element is made of."""
        if self._parts is None:
            if self._make is None:
                size = int(np.prod(self.base.shape, dtype=np.int64))
                if size > MAX_KNOWN:
                    raise UnsupportedError(f"an activation of shape {self.base.shape} is too large to follow")
                self._parts = [(np.arange(size, dtype=np.int64).reshape(self.shape), None)]
            else:
                self._parts = self._make()
        return self._parts

    @property
    def is_whole(self) -> bool:
        """Whether it is the base's elements in order (the shape may differ)."""
        if self._make is None:
            return True
        if int(np.prod(self.shape)) != int(np.prod(self.base.shape)) or len(self.parts) != 1:
            return False
        index, factor = self.parts[0]
        return factor is None and bool((index.reshape(-1) == np.arange(index.size)).all())

    def moved(self, shape: tuple[int, ...], move: Callable[[Array], Array]) -> View:
        """Elements moved, repeated or left out, as ``move`` does with an array of ``self.shape``."""

        def make() -> list[Part]:
            return [
                (move(index), None if factor is None else move(np.broadcast_to(factor, index.shape)))
                for index, factor in self.parts
            ]

        return View(self.base, shape, make, self.gain, self.sources)

    def reshaped(self, shape: tuple[int, ...]) -> View:
        """Another shape, the same order."""
        if self._make is None:
            return View(self.base, shape, None, self.gain, self.sources)
        return self.moved(shape, lambda array: array.reshape(shape))

    def scaled(self, factor: float) -> View:
        """Times a number."""
        return View(self.base, self.shape, self._make, self.gain * factor, self.sources)

    def weighted(self, factors: Array, shape: tuple[int, ...], source: str) -> View:
        """Times an array that broadcasts; ``source`` is its name."""

        def make() -> list[Part]:
            return [
                (
                    np.broadcast_to(index, shape),
                    factors * (1.0 if factor is None else factor) + np.zeros(shape),
                )
                for index, factor in self.parts
            ]

        return View(self.base, shape, make, self.gain, (*self.sources, source))

    def on(self, base: Term) -> View:
        """The same elements of another term of the same size."""
        return View(base, self.shape, self._make, 1.0)


Value = Known | Weight | Quantized | Centres | View
