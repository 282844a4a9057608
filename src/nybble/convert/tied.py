"""Tied embeddings found again: ONNX graphs have no word for them, only two equal matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.tensor import Tensor
from nybble.convert.rules import EMBEDDING, OUTPUT

_COMPARED = 64 << 20  # bytes at a time


def tied_again(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of an ONNX model without its output matrix, where that is the embedding."""
    one, other = checkpoint.tensors.get(EMBEDDING), checkpoint.tensors.get(OUTPUT)
    if checkpoint.format != "onnx" or one is None or other is None or not _equal(one, other):
        return checkpoint
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != OUTPUT}
    config = replace(checkpoint.config, tie_word_embeddings=True)
    return replace(checkpoint, config=config, tensors=tensors)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.encoding.name != other.encoding.name:
        return False
    first, second = one.data, other.data
    return all(
        np.array_equal(first[at : at + _COMPARED], second[at : at + _COMPARED])
        for at in range(0, first.size, _COMPARED)
    )
