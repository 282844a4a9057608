"""Adapters beside a checkpoint's weights, so that a device applies them while it runs.

The matrices of all adapters that change one weight are stacked, and the model's graph computes

    y = linear(x, W) + linear(scale_by_sequence(linear(x, A)), B)

where ``scale_by_sequence`` multiplies each adapter's columns by its weight in the row's sequence.
Beside ``P.weight`` the checkpoint gets

    P.adapters.a       (rank, in_features); of the embedding (vocab_size, rank); ranks of all added up
    P.adapters.b       (out_features, rank)
    P.adapters.slots   i32 (rank,): the adapter that each column belongs to
    P.adapters.scales  f32 (rank,): the scale of that adapter's pair

B has columns of zeros up to a multiple of 32, which is what fast kernels want of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nybble.checkpoint.adapter import EMBEDDING, Adapter, LoraPair, fitted
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.base import Bytes
from nybble.checkpoint.tensor import Tensor
from nybble.graph.graph import SEQUENCE_SCALE_MULTIPLE

MAX_ADAPTERS = 1024


def with_adapters(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The checkpoint with adapters that its sequences can turn on; their names are ``adapters``.

    Raises:
        UnsupportedError: an adapter does not fit the model.
        ValueError: two have the same name, or there are too many.
    """
    names = tuple(adapter.name for adapter in adapters)
    if len(set(names)) < len(names) or checkpoint.adapters:
        raise ValueError(f"adapters need names of their own, and are given at once: {', '.join(names)}")
    if len(names) > MAX_ADAPTERS:
        raise ValueError(f"{len(names)} adapters; at most {MAX_ADAPTERS} are allowed")
    members: dict[str, list[tuple[int, LoraPair]]] = {}
    for slot, adapter in enumerate(adapters):
        for name, pair in fitted(adapter, checkpoint.config, checkpoint.tensors).pairs.items():
            members.setdefault(name, []).append((slot, pair))
    tensors = dict(checkpoint.tensors)
    for name, pairs in members.items():
        tensors |= {tensor.name: tensor for tensor in _stacked(name, pairs)}
    return replace(checkpoint, tensors=tensors, adapters=names)


def _stacked(name: str, members: list[tuple[int, LoraPair]]) -> list[Tensor]:
    prefix = name.removesuffix("weight") + "adapters."
    fill = -sum(pair.rank for _, pair in members) % SEQUENCE_SCALE_MULTIPLE
    slots = np.concatenate([np.full(pair.rank, slot, "<i4") for slot, pair in members])
    scales = np.concatenate([np.full(pair.rank, pair.scale, "<f4") for _, pair in members])
    a = [pair.a for _, pair in members]
    return [
        _side_by_side(f"{prefix}a", [_transposed(t) for t in a])
        if name == EMBEDDING
        else _below(f"{prefix}a", a),
        _side_by_side(f"{prefix}b", [pair.b for _, pair in members], fill),
        Tensor(f"{prefix}slots", slots.shape, encoding("i32"), slots.view(np.uint8)),
        Tensor(f"{prefix}scales", scales.shape, encoding("f32"), scales.view(np.uint8)),
    ]


def _below(name: str, parts: list[Tensor]) -> Tensor:
    """The rows of all parts; in their encoding where they share one, else in float32."""
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    if len({part.encoding.name for part in parts}) > 1:
        parts = [_in_f32(part) for part in parts]
    return parts[0].changed(name=name, shape=shape, data=np.concatenate([part.data for part in parts]))


def _side_by_side(name: str, parts: list[Tensor], fill: int = 0) -> Tensor:
    """The columns of all parts and of zeros; in their encoding if they share one without blocks."""
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts) + fill
    if len({part.encoding.name for part in parts}) > 1 or parts[0].encoding.block_size > 1:
        parts = [_in_f32(part) for part in parts]
    zeros = np.zeros((rows, parts[0].encoding.nbytes(fill)), np.uint8)
    data = np.concatenate([*(part.data.reshape(rows, -1) for part in parts), zeros], axis=1)
    return parts[0].changed(name=name, shape=(rows, columns), data=data.reshape(-1))


def _transposed(tensor: Tensor) -> Tensor:
    """The transposed matrix, in float32 where it has blocks."""
    if tensor.encoding.block_size > 1:
        tensor = _in_f32(tensor)
    return transposed(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The transposed matrix of an encoding without blocks; computed when its data is asked for."""
    rows, columns = tensor.shape
    if tensor.encoding.block_size > 1:
        raise ValueError(f"{tensor.name}: {tensor.encoding.name} has blocks and cannot be transposed")

    def data() -> Bytes:
        elements = tensor.data.reshape(rows, columns, tensor.encoding.block_bytes)
        turned: Bytes = np.ascontiguousarray(elements.transpose(1, 0, 2)).reshape(-1)
        return turned

    return tensor.changed(shape=(columns, rows), data=data)


def _in_f32(tensor: Tensor) -> Tensor:
    values = np.ascontiguousarray(tensor.dequantize(), "<f4")
    return tensor.changed(encoding=encoding("f32"), data=values.reshape(-1).view(np.uint8))
