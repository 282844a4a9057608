"""Affine weights with random codes, scales, zero points and minima, alone and in tiny checkpoints."""

from __future__ import annotations

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts, affine_format, join
from nybble.checkpoint.tensor import Tensor
from support.random_checkpoints import LLAMA, random_checkpoint, with_tensors


def affine_parts(
    form: AffineFormat, shape: tuple[int, int], seed: int = 0, zero_points: tuple[int, int] | None = None
) -> AffineParts:
    """Random parts; zero points in the range given, both ends included, or in that of the codes."""
    random = np.random.default_rng(seed)
    rows, groups = shape[0], shape[1] // form.group_size
    scales = (random.uniform(0.5, 1.5, (rows, groups)) * 0.1 / 2**form.bits).astype(np.float32)
    quantize = encoding(form.scale).quantize
    assert quantize is not None
    low, high = zero_points or (0, 2**form.bits - 1)
    return AffineParts(
        random.integers(0, 2**form.bits, shape, dtype=np.uint8),
        quantize(scales).reshape(rows, groups, form.scale_bytes),
        random.integers(low, high, (rows, groups), np.uint8, endpoint=True) if form.has_zero_point else None,
    )


def affine_tensor(
    name: str,
    form: AffineFormat,
    shape: tuple[int, int],
    seed: int = 0,
    zero_points: tuple[int, int] | None = None,
) -> Tensor:
    """A weight of such parts."""
    data = join(affine_parts(form, shape, seed, zero_points), form)
    return Tensor(name, shape, encoding(form.name), data)


def tensor_with_minima(tensor: Tensor, form: AffineFormat, highest: int | None = None) -> Tensor:
    """A matrix in a form that has minima: codes 0 to ``highest`` span each group."""
    rows, columns = tensor.shape
    values = tensor.dequantize().reshape(rows, columns // form.group_size, form.group_size)
    highest = 2**form.bits - 1 if highest is None else highest
    low = values.min(axis=2, keepdims=True)
    step = (values.max(axis=2, keepdims=True) - low) / np.float32(highest)
    codes = np.clip(np.rint((values - low) / step), 0, highest).astype(np.uint8).reshape(rows, columns)
    quantize = encoding(form.scale).quantize
    assert quantize is not None
    scales, minima = (
        quantize(np.ascontiguousarray(part, np.float32)).reshape(*low.shape[:2], -1) for part in (step, low)
    )
    data = join(AffineParts(codes, scales, None, minima), form)
    return tensor.changed(encoding=encoding(form.name), data=data)


def checkpoint_with_minima(
    checkpoint: Checkpoint, kind: str, highest: int | None = None, *, layers_only: bool = False
) -> Checkpoint:
    """The checkpoint with its matrices in an encoding that has minima."""
    form = affine_format(kind)
    assert form is not None and form.has_minimum
    changed = {
        name: tensor_with_minima(tensor, form, highest)
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and (not layers_only or ".layers." in name)
    }
    return with_tensors(checkpoint, changed)


def permutation_tensor(name: str, columns: int, seed: int = 0) -> Tensor:
    """A random order of columns, i32 (columns,)."""
    order = np.random.default_rng(seed).permutation(columns).astype("<i4")
    return Tensor(name, (columns,), encoding("i32"), order.view(np.uint8))


def affine_checkpoint(
    form: AffineFormat,
    config: ModelConfig = LLAMA,
    *,
    zero_points: tuple[int, int] | None = None,
    act_order: bool = False,
) -> Checkpoint:
    """A model whose layers' linears are affine; ``act_order``: each with its own order of columns.

    A group size of 0 means whole rows.
    """
    checkpoint = random_checkpoint(config)
    tensors: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(checkpoint.tensors.items()):
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            own = AffineFormat(form.bits, form.group_size or columns, form.scale, form.has_zero_point)
            tensors[name] = affine_tensor(name, own, (rows, columns), seed, zero_points)
            if act_order:
                other = name.removesuffix("weight") + "input_permutation"
                tensors[other] = permutation_tensor(other, columns, seed)
    checkpoint.tensors = tensors
    return checkpoint


def plain_tensor(name: str, array: np.ndarray) -> Tensor:
    """An array of i8, i32, i64, f16 or f32 as a tensor of a file."""
    kinds = {"int8": "i8", "int32": "i32", "int64": "i64", "float16": "f16", "float32": "f32"}
    kind = encoding(kinds[array.dtype.name])
    return Tensor(name, array.shape, kind, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
