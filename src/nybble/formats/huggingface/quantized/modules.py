"""What the packings share: the tensors of one linear, checked one by one, and the affine weight of them.

A quantized linear ``X`` lies in a file as several tensors, its pieces: ``X.qweight``, ``X.scales`` and so
on. Each must be there with the shape that the others ask for, and none may be left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts, affine_format, join, split
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError

Bytes = npt.NDArray[np.uint8]

SCALE_TYPES = ("f16", "bf16", "f32")
EMBEDDING = "model.embed_tokens"
PERMUTATION = "input_permutation"
_MOST_REPEATS = 6


# -- reading -----------------------------------------------------------------------------------------


class Pieces:
    """The pieces of one linear, taken one after another."""

    def __init__(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        self.module = module
        self._left = dict(tensors)

    def has(self, piece: str) -> bool:
        """Whether the piece is there and was not taken."""
        return piece in self._left

    def has_any(self) -> bool:
        """Whether a piece is left."""
        return bool(self._left)

    def is_encoded(self, piece: str, name: str) -> bool:
        """Whether a piece that is there has this encoding."""
        return self._left[piece].encoding.name == name

    def take(self, piece: str, encodings: Collection[str], shape: tuple[int, ...] | None = None) -> Tensor:
        """A piece of one of these plain encodings, of this shape or, without one, a matrix.

        Raises:
            FormatError: it is missing, or is something else.
        """
        return self.take_one_of(piece, encodings, () if shape is None else (shape,))

    def take_one_of(
        self, piece: str, encodings: Collection[str], shapes: Collection[tuple[int, ...]]
    ) -> Tensor:
        """The same where several shapes are possible.

        Raises:
            FormatError: it is missing, or is something else.
        """
        tensor = self._left.pop(piece, None)
        if tensor is None:
            raise FormatError(f"{self.module}.{piece}: is missing beside the other tensors of {self.module}")
        fits = tensor.shape in shapes if shapes else len(tensor.shape) == 2 and min(tensor.shape) > 0
        if not fits or tensor.encoding.name not in encodings:
            shape = f"of shape {' or '.join(map(str, shapes))}" if shapes else "matrix"
            raise FormatError(
                f"{tensor.name}: expected {' or '.join(encodings)} {shape},"
                f" found {tensor.encoding.name} of shape {tensor.shape}"
            )
        return tensor

    def drop(self, pieces: Collection[str]) -> None:
        """Forgets pieces that do not change the weight."""
        for piece in pieces:
            self._left.pop(piece, None)

    def finish(self) -> None:
        """FormatError where a piece is left over."""
        for piece in self._left:
            raise FormatError(f"{self.module}.{piece}: does not belong to this packing of {self.module}")

    def error(self, piece: str, problem: str) -> FormatError:
        """The error for a bad piece."""
        return FormatError(f"{self.module}.{piece}: {problem}")


def replaced(
    raw: Mapping[str, Tensor],
    is_piece: Callable[[str, str], bool],
    read: Callable[[Pieces], Iterator[Tensor]],
) -> dict[str, Tensor]:
    """``raw`` with the pieces of each linear replaced by what ``read`` makes of them, in the file's order.

    ``is_piece`` is asked with a tensor's module and last name.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in raw.items():
        module, _, piece = name.rpartition(".")
        if is_piece(module, piece):
            modules.setdefault(module, {})[piece] = tensor
    result: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        module, _, piece = name.rpartition(".")
        if piece not in modules.get(module, ()):
            new = [tensor.changed(name=name)]
        elif piece != next(iter(modules[module])):
            continue  # made with the first piece
        else:
            pieces = Pieces(module, modules[module])
            new = list(read(pieces))
            pieces.finish()
        for item in new:
            own = item.name.rpartition(".")[2] in modules.get(module, ())
            if item.name in result or (item.name in raw and item.name != name and not own):
                raise FormatError(f"{item.name}: is there both quantized and not")
            result[item.name] = item
    return result


def affine_weight(
    module: str, shape: tuple[int, int], form: AffineFormat, parts: Callable[[], AffineParts]
) -> Tensor:
    """``module``.weight, made of ``parts`` whenever its data is asked for.

    Raises:
        UnsupportedError: groups that the affine encodings do not have.
    """
    name = f"{module}.weight"
    if affine_format(form.name) != form or shape[1] % form.group_size:
        raise UnsupportedError(
            f"{name}: {shape[1]} columns in groups of {form.group_size} codes of {form.bits} bits; groups"
            " must be of equal size and whole bytes"
        )
    return Tensor(name, shape, encoding(form.name), lambda: join(parts(), form))


def symmetric(zero_points: Bytes, form: AffineFormat) -> bool:
    """Whether all zero points are the one that an encoding without them means."""
    return bool((zero_points == form.middle).all())


def sorted_columns(index: Tensor, groups: int, *, absent: int | None = None) -> npt.NDArray[np.int64] | None:
    """The order that sorts columns by their group, keeping that of a group's own; None where they are sorted.

    ``index``: i32 or i64 (in_features,), the group of each column; one that holds ``absent`` says nothing.

    Raises:
        FormatError: groups do not have equally many columns.
    """
    numbers = np.ascontiguousarray(index.data).view("<i4" if index.encoding.name == "i32" else "<i8")
    if absent is not None and (numbers == absent).any():
        return None
    columns, size = len(numbers), len(numbers) // groups
    if numbers.min() < 0 or numbers.max() >= groups:
        raise FormatError(
            f"{index.name}: holds {numbers.min()} .. {numbers.max()}; there are {groups} groups"
        )
    counts = np.bincount(numbers.astype(np.int64), minlength=groups)
    if (counts != size).any():
        bad = int(np.flatnonzero(counts != size)[0])
        raise FormatError(
            f"{index.name}: gives group {bad} {counts[bad]} columns instead of {size}: groups must be of"
            " equal size"
        )
    order = np.argsort(numbers, kind="stable").astype(np.int64)
    return None if (order == np.arange(columns)).all() else order


def matches(pattern: str, module: str, where: str) -> bool:
    """Whether a regular expression of a config matches the beginning of a module's name.

    Raises:
        FormatError: it is no regular expression.
        UnsupportedError: it is one that can take very long.
    """
    repeats = len(re.findall(r"[*+]|\{\d+,", pattern))
    if len(pattern) > 1000 or len(module) > 300 or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        raise UnsupportedError(f"{where}: the pattern {pattern[:60]!r} is too complex")
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise FormatError(f"{where}: {pattern[:60]!r} is no regular expression: {error}") from None


# -- writing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedLinear:
    """One affine weight of a checkpoint."""

    module: str
    tensor: Tensor
    form: AffineFormat
    permutation: Tensor | None
    """i32 (in_features,): the order of its columns, where it is not the model's."""

    @property
    def rows(self) -> int:
        """Output features."""
        return self.tensor.shape[0]

    @property
    def columns(self) -> int:
        """Input features."""
        return self.tensor.shape[1]

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.columns // self.form.group_size

    def refuse(self, method: str, reason: str) -> UnsupportedError:
        """The error that says why a packing cannot hold this weight."""
        return UnsupportedError(f"{self.tensor.name} ({self.tensor.encoding.name}): {method} {reason}")


def quantized_linears(checkpoint: Checkpoint, method: str) -> dict[str, QuantizedLinear]:
    """The affine weights of a checkpoint by module.

    Raises:
        UnsupportedError: there is none, or a tensor has an encoding that such folders do not have.
    """
    found: dict[str, QuantizedLinear] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        form = affine_format(tensor.encoding.name)
        if form is not None:
            if last != "weight" or len(tensor.shape) != 2:
                raise UnsupportedError(f"{name}: {method} packs the weights of linears only")
            if form.has_minimum:
                raise UnsupportedError(
                    f"{name} ({tensor.encoding.name}): {method} has whole zero points, and no minima"
                )
            permutation = checkpoint.tensors.get(f"{module}.{PERMUTATION}")
            found[module] = QuantizedLinear(module, tensor, form, permutation)
        elif tensor.encoding.name not in (*SCALE_TYPES, "i32"):
            raise UnsupportedError(
                f"{name}: {tensor.encoding.name} has no place in a {method} folder; it holds affine integers"
                " and f32, f16 or bf16"
            )
    for name in checkpoint.tensors:
        module, _, last = name.rpartition(".")
        if last == PERMUTATION and module not in found:
            raise UnsupportedError(f"{name}: belongs to no quantized weight, which {method} needs")
    if not found:
        raise UnsupportedError(
            f"no tensor of the model is quantized to affine integers: nothing for {method}"
        )
    return found


def common_group_size(method: str, linears: Mapping[str, QuantizedLinear]) -> int:
    """The group size of all weights; -1 where a group is a whole row.

    Raises:
        UnsupportedError: weights differ, but the packing has one size for all.
    """
    first = next(iter(linears.values()))
    if all(linear.groups == 1 for linear in linears.values()):
        return -1
    for linear in linears.values():
        if linear.form.group_size != first.form.group_size:
            raise linear.refuse(
                method,
                f"has one group size for all weights, and {first.tensor.name} has {first.form.group_size}",
            )
    return first.form.group_size


def plain_linears(checkpoint: Checkpoint, quantized: Collection[str]) -> list[str]:
    """Modules of the linears that are not quantized, the output projection included."""
    names = [
        name.removesuffix(".weight")
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    ]
    found = [name for name in names if name not in quantized and name != EMBEDDING]
    if "lm_head" not in found and "lm_head" not in quantized:
        found.append("lm_head")  # tied to the embedding, but a module of its own in transformers
    return found


def written(
    checkpoint: Checkpoint,
    quantized: Mapping[str, QuantizedLinear],
    pack: Callable[[QuantizedLinear, Callable[[], AffineParts]], Iterator[Tensor]],
) -> dict[str, Tensor]:
    """The checkpoint's tensors with each affine weight replaced by its pieces.

    The pieces of one weight come from one reading of it, as long as they are asked for one after another.
    """
    last: list[tuple[str, AffineParts]] = []

    def parts_of(linear: QuantizedLinear) -> Callable[[], AffineParts]:
        def parts() -> AffineParts:
            if not last or last[0][0] != linear.module:
                last.clear()
                last.append((linear.module, split(linear.tensor.data, linear.columns, linear.form)))
            return last[0][1]

        return parts

    result: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, piece = name.rpartition(".")
        if module in quantized and piece == "weight":
            linear = quantized[module]
            for new in pack(linear, parts_of(linear)):
                result[new.name] = new
        elif piece != PERMUTATION:
            result[name] = tensor
    return result
