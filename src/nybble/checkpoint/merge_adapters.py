"""Adapters merged into a checkpoint: W + weight * scale * (B @ A), computed when a tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.adapter import EMBEDDING, OUTPUT, Adapter, LoraPair, fitted
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import Encoding
from nybble.checkpoint.encodings import encoding as encoding_of
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.errors import ConversionError

Doubles = npt.NDArray[np.float64]

PLAIN = ("f32", "f16", "bf16")
OWN = "own"
_CHUNK = 1 << 22  # elements worked on at a time
_SHOWN = 3


def merge_adapters(
    checkpoint: Checkpoint,
    adapters: Mapping[Adapter, float],
    *,
    encoding: str | Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint with adapters in its weights.

    Sums are rounded once, to float32, and nothing is computed before a tensor's data is asked for. Where the
    output matrix is the embedding and an adapter changes one of the two, they become two matrices.

    Args:
        checkpoint: the base model.
        adapters: the weight of each; 0 leaves an adapter out.
        encoding: what changed tensors become: a name, or ``own``: what each is; or that by the name of
            the tensor. None, or a name that is absent: its own where that is f32, f16 or bf16.

    Raises:
        UnsupportedError: an adapter does not fit the model, or the encoding does not exist.
        ConversionError: a changed tensor is quantized and ``encoding`` does not say what it becomes, or
            the encoding cannot be written.
    """
    members: dict[str, list[tuple[float, LoraPair]]] = {}
    for adapter, weight in adapters.items():
        if weight == 0:
            continue
        for name, pair in fitted(adapter, checkpoint.config, checkpoint.tensors).pairs.items():
            members.setdefault(name, []).append((weight * pair.scale, pair))
    tensors = dict(checkpoint.tensors)
    config = checkpoint.config
    if config.tie_word_embeddings and (OUTPUT in members or EMBEDDING in members):
        config = replace(config, tie_word_embeddings=False)
        tensors[OUTPUT] = tensors[EMBEDDING].changed(name=OUTPUT)
    chosen = encoding if isinstance(encoding, Mapping) else dict.fromkeys(members, encoding)
    targets = _targets(tensors, members, chosen)
    for name, changes in members.items():
        target = targets[name]
        order = tensors.get(name.removesuffix("weight") + "input_permutation")
        tensors[name] = _merged(tensors[name], changes, target, order)
    return replace(checkpoint, config=config, tensors=tensors)


def merged_names(adapters: Mapping[Adapter, float]) -> frozenset[str]:
    """The tensors that ``merge_adapters`` changes."""
    return frozenset(name for adapter, weight in adapters.items() if weight for name in adapter.pairs)


def _targets(
    tensors: Mapping[str, Tensor], names: Iterable[str], chosen: Mapping[str, str | None]
) -> dict[str, Encoding]:
    """What each changed tensor becomes."""
    unsaid = [name for name in names if tensors[name].encoding.name not in PLAIN and not chosen.get(name)]
    if unsaid:
        kinds = ", ".join(sorted({tensors[name].encoding.name for name in unsaid}))
        shown = ", ".join(unsaid[:_SHOWN]) + (", ..." if len(unsaid) > _SHOWN else "")
        raise ConversionError(
            f"an adapter merged into quantized weights ({kinds}) gives values that they cannot hold, in"
            f" {len(unsaid)} tensors: {shown}; name an encoding (f16, bf16, q8_0, ...), or allow loss to have"
            " them quantized again as they were"
        )
    targets: dict[str, Encoding] = {}
    for name in names:
        wanted = chosen.get(name)
        target = tensors[name].encoding if wanted in (None, OWN) else encoding_of(str(wanted))
        if target.quantize is None or tensors[name].shape[-1] % target.block_size:
            raise ConversionError(
                f"{name}: nybble cannot quantize it to {target.name}; name another encoding"
            )
        targets[name] = target
    return targets


def _merged(
    tensor: Tensor, changes: list[tuple[float, LoraPair]], target: Encoding, order: Tensor | None
) -> Tensor:
    rows, columns = tensor.shape
    step = max(1, _CHUNK // columns)
    quantize = target.quantize
    assert quantize is not None

    def data() -> Bytes:
        source = tensor.data.reshape(rows, -1)
        out = np.empty((rows, target.nbytes(columns)), np.uint8)
        products = [_Product(*_factors(tensor.name, factor, pair, order)) for factor, pair in changes]
        for start in range(0, rows, step):
            part = np.ascontiguousarray(source[start : start + step])
            values = tensor.encoding.dequantize(part.reshape(-1)).reshape(len(part), columns)
            total = values.astype(np.float64)
            for product in products:
                product.add_to(total, start)
            out[start : start + step] = quantize(total.astype(np.float32).reshape(-1)).reshape(len(part), -1)
        return out.reshape(-1)

    return tensor.changed(encoding=target, data=data)


def _factors(name: str, factor: float, pair: LoraPair, order: Tensor | None) -> tuple[Doubles, Doubles]:
    """Two matrices whose product is the change of the tensor as it lies."""
    a, b = pair.a.dequantize().astype(np.float64), pair.b.dequantize().astype(np.float64) * factor
    if name == EMBEDDING:
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    if order is not None:
        a = a[:, order.data.view("<i4")]
    return b, a


class _Product:
    """left @ right with the same bits on every machine, though libraries add in an order of their own.

    Each factor is split into a coarse and a fine part of few bits above a unit of its row (of ``right``:
    its column). Then float64 holds every product and every sum exactly, in whatever order. Fine times fine
    is left out: it is below float64's own rounding, or nearly.
    """

    def __init__(self, left: Doubles, right: Doubles) -> None:
        bits = (52 - math.ceil(math.log2(left.shape[1]))) // 2
        self._left = _split(left, bits, axis=1)
        self._right = _split(right, bits, axis=0)

    def add_to(self, total: Doubles, start: int) -> None:
        """Adds the rows from ``start`` on, as many as ``total`` has."""
        coarse, fine = (part[start : start + len(total)] for part in self._left)
        total += coarse @ self._right[0]
        total += coarse @ self._right[1]
        total += fine @ self._right[0]


def _split(values: Doubles, bits: int, axis: int) -> tuple[Doubles, Doubles]:
    """Multiples of a unit and of a unit 2**bits finer; units are powers of two, by the largest value."""
    _, exponent = np.frexp(np.abs(values).max(axis=axis, keepdims=True))
    exponent = np.maximum(exponent, -400)  # far below float32: units stay normal numbers
    unit, finer = np.ldexp(1.0, exponent - bits), np.ldexp(1.0, exponent - 2 * bits)
    with np.errstate(all="ignore"):
        coarse = np.rint(values / unit) * unit
        return coarse, np.rint((values - coarse) / finer) * finer
