"""Weights: how large a model's are, and how far they are from another's, tensor by tensor.

Both checkpoints are read a few rows at a time. They may be of different formats: names are canonical,
and rows and norms are brought into one form (``checkpoint/forms.py``). Matrices that one model holds
fused and the other in parts are compared as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.forms import to_onnx_form
from nybble.checkpoint.tensor import Tensor

OUTPUT = "lm_head.weight"
PERMUTATION = ".input_permutation"
FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Matrices that some families hold as one, and their parts, whose rows follow one another."""
NORM_CHANGE = 1e-3
"""Relative error of a norm's weights from which something was folded into them, not just rounded."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ELEMENTS = 1 << 21  # float32 values worked on at a time
_SCALINGS = 5
_KEPT = 1 << 26  # elements of matrices that are decoded once for all scalings

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WeightError:
    """How far a tensor is from the reference's."""

    name: str
    layer: int | None
    """None: of no layer (embedding, final norm, output matrix)."""
    kind: str
    """``self_attn.q_proj``; of no layer, the whole name without ``.weight``."""
    relative_error: float
    """Root of the squared differences over that of the reference's squares."""
    encoding: str
    """How the model holds it."""
    reference_encoding: str


def parameters(checkpoint: Checkpoint) -> int:
    """Weights that a model has: an embedding that is also the output matrix counts once."""
    return sum(
        math.prod(tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if not name.endswith(PERMUTATION) and not (name == OUTPUT and checkpoint.config.tie_word_embeddings)
    )


def stored_bytes(path: Path, checkpoint: Checkpoint) -> int:
    """Bytes that a model's weights take where they are stored.

    Of a GGUF file the tensors; of a Hugging Face folder the safetensors files; of an ONNX model its
    file and the external data that it uses. Tokenizers do not count.
    """
    if checkpoint.format == "onnx":
        from nybble.formats.onnx.folder import describe_decoder

        return describe_decoder(path).weight_bytes
    if checkpoint.format == "safetensors":
        from nybble.formats.huggingface.checkpoint import weights_path
        from nybble.formats.safetensors.reader import read_safetensors

        with read_safetensors(weights_path(path)) as files:
            return sum(file.stat().st_size for file in files.paths)
    return checkpoint.stored_bytes


def weight_errors(
    reference: Checkpoint, other: Checkpoint, seen: Callable[[str], None] | None = None
) -> tuple[list[WeightError], list[str]]:
    """The errors of all tensors that can be compared, and notes about those that cannot.

    Args:
        reference: what the other was made from.
        other: the model that is judged.
        seen: called with each tensor's name before it is read.

    Raises:
        UnsupportedError: a form that the two have in common does not exist.
    """
    one, two = to_onnx_form(reference), to_onnx_form(other)
    pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    alone: list[str] = []
    for name in _names(one, two):
        mine, theirs = _parts(one, name), _parts(two, name)
        if not mine or not theirs or _shape(mine) != _shape(theirs):
            alone.append(name)
        else:
            pairs[name] = mine, theirs
    found: dict[str, float] = {}
    scaled = False
    for name, (mine, theirs) in sorted(
        pairs.items(), key=lambda item: len(_shape(item[1][0]))
    ):  # norms first
        if seen is not None:
            seen(name)
        rows = _Rows(one, mine), _Rows(two, theirs)
        is_matrix = len(_shape(mine)) == 2
        error = _scaled_error(*rows) if scaled and is_matrix else _relative_error(*rows)
        if name.endswith("norm.weight") and error > NORM_CHANGE:
            scaled = True
            continue  # changed on purpose: this is no error
        found[name] = error
    errors = [
        WeightError(name, *_place(name), found[name], _encodings(theirs), _encodings(mine))
        for name, (mine, theirs) in pairs.items()
        if name in found
    ]
    notes = []
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        notes.append(f"not in both, or of another shape: {', '.join(alone[:3])}{more}")
    if scaled:
        notes.append(
            "norm weights differ: scales were moved between norms and matrices, as AWQ does; errors of"
            " matrices are those that are left when each row and column is scaled back"
        )
    return errors, notes


def _names(one: Checkpoint, two: Checkpoint) -> list[str]:
    """Names of both, fused ones in place of their parts where either model has them fused."""
    fused = {
        name: [name.replace(whole, part) for part in parts]
        for name in {*one.tensors, *two.tensors}
        for whole, parts in FUSED.items()
        if f".{whole}." in name
    }
    covered = {part for parts in fused.values() for part in parts}
    names = dict.fromkeys([*one.tensors, *two.tensors])
    result: dict[str, None] = {}
    for name in names:
        if name.endswith(PERMUTATION):
            continue
        if name in covered:
            result[next(whole for whole, parts in fused.items() if name in parts)] = None
        else:
            result[name] = None
    return list(result)


def _parts(checkpoint: Checkpoint, name: str) -> list[Tensor]:
    """The tensor of that name, or the parts that make it up; empty where it has neither."""
    found = checkpoint.tensors.get(name)
    if found is not None:
        return [found]
    for whole, parts in FUSED.items():
        if f".{whole}." in name:
            tensors = [checkpoint.tensors.get(name.replace(whole, part)) for part in parts]
            return [tensor for tensor in tensors if tensor is not None] if all(tensors) else []
    return []


def _shape(parts: Sequence[Tensor]) -> tuple[int, ...]:
    return (sum(tensor.shape[0] for tensor in parts), *parts[0].shape[1:]) if parts[0].shape else ()


def _encodings(parts: Sequence[Tensor]) -> str:
    return ", ".join(dict.fromkeys(tensor.encoding.name for tensor in parts))


def _place(name: str) -> tuple[int | None, str]:
    match = _LAYER.fullmatch(name)
    if match is not None:
        return int(match[1]), match[2].removesuffix(".weight")
    return None, name.removesuffix(".weight")


class _Rows:
    """The rows of tensors that follow one another, dequantized when asked for."""

    def __init__(self, checkpoint: Checkpoint, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.rows, *rest = _shape(parts) or (1,)
        self.columns = math.prod(rest)
        self._data: tuple[int, npt.NDArray[np.uint8]] = (-1, np.empty(0, np.uint8))
        self._orders = [_column_order(checkpoint, tensor) for tensor in parts]

    def read(self, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop`` as float32 (rows, columns)."""
        found = []
        first = 0
        for index, tensor in enumerate(self.parts):
            count = tensor.shape[0] if tensor.shape else 1
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                if self._data[0] != index:  # what is computed on access is computed once
                    self._data = (index, tensor.data)
                row_bytes = len(self._data[1]) // count
                data = self._data[1][low * row_bytes : high * row_bytes]
                values = tensor.encoding.dequantize(data).reshape(high - low, -1)
                order = self._orders[index]
                found.append(values if order is None else values[:, order])
            first += count
        return found[0] if len(found) == 1 else np.concatenate(found)


def _column_order(checkpoint: Checkpoint, tensor: Tensor) -> npt.NDArray[np.int64] | None:
    """Where each column lies, if they are sorted by group (GPTQ's act-order)."""
    permutation = checkpoint.tensors.get(tensor.name.removesuffix(".weight") + PERMUTATION)
    if permutation is None:
        return None
    return np.argsort(permutation.data.view("<i4"))


def _relative_error(one: _Rows, two: _Rows) -> float:
    different = total = 0.0
    for start, stop in _pieces(one):
        reference, other = one.read(start, stop).astype(np.float64), two.read(start, stop)
        total += float(np.square(reference).sum())
        different += float(np.square(reference - other).sum())
    if total == 0.0:
        return 0.0 if different == 0.0 else math.inf
    return math.sqrt(different / total)


def _scaled_error(one: _Rows, two: _Rows) -> float:
    """The relative error that is left when rows and columns of the second are scaled to fit the first best.

    In turn by least squares: rows for given columns, columns for these rows. One number for hundreds of
    values takes next to nothing of what rounding did.
    """
    pieces = list(_pieces(one))
    keep = one.rows * one.columns <= _KEPT
    kept: dict[int, tuple[Floats, Floats]] = {}
    columns = np.ones(one.columns)
    different = total = 0.0
    for _ in range(_SCALINGS):
        cross, squares = np.zeros(one.columns), np.zeros(one.columns)
        different = total = 0.0
        for start, stop in pieces:
            reference, unscaled = kept.get(start) or (one.read(start, stop), two.read(start, stop))
            if keep:
                kept[start] = reference, unscaled
            other = unscaled * columns.astype(np.float32)
            other *= _fit(_sums("ij,ij->i", reference, other), _sums("ij,ij->i", other, other))[:, None]
            difference = reference - other
            total += float(np.vdot(reference, reference))
            different += float(np.vdot(difference, difference))
            cross += _sums("ij,ij->j", reference, other)
            squares += _sums("ij,ij->j", other, other)
        columns = columns * _fit(cross, squares)
    return math.sqrt(different / total) if total else 0.0


def _sums(over: str, one: Floats, other: Floats) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = np.einsum(over, one, other).astype(np.float64)
    return result


def _fit(cross: npt.NDArray[np.float64], squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """cross / squares; 1 where there is nothing to scale."""
    there = squares > 0
    result: npt.NDArray[np.float64] = np.where(there, cross / np.where(there, squares, 1.0), 1.0)
    return result


def _pieces(rows: _Rows) -> Iterator[tuple[int, int]]:
    """Some rows at a time; of a vector, whose encoding may have blocks, all of it."""
    step = rows.rows if rows.columns == 1 else max(1, _ELEMENTS // rows.columns)
    for start in range(0, rows.rows, step):
        yield start, min(start + step, rows.rows)
