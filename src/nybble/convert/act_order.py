"""GPTQ's act-order undone for formats that cannot say it: columns back in the input's order.

Such a matrix has its columns sorted by group, and a permutation of its inputs beside it
(``X.input_permutation``). In the input's order neighbours have different scales, so that no encoding
of groups holds it any more: it becomes float32, from which the caller has a new encoding made.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import FormName
from nybble.checkpoint.tensor import Bytes, Tensor
from nybble.convert.choice import Choice
from nybble.errors import ConversionError

PERMUTATION = ".input_permutation"


def columns_in_order(checkpoint: Checkpoint, form: FormName, choice: Choice) -> tuple[Checkpoint, list[str]]:
    """The checkpoint without permutations where the format has no place for them, and notes.

    Raises:
        ConversionError: there are some, and the caller did not say what the matrices should become.
    """
    names = [name for name in checkpoint.tensors if name.endswith(PERMUTATION)]
    if form != "gguf" or not names:
        return checkpoint, []
    weights = {name.removesuffix(PERMUTATION) + ".weight": name for name in names}
    unnamed = [name for name in weights if choice.named(name) is None and choice.encoding is None]
    if unnamed:
        raise ConversionError(
            f"{len(unnamed)} matrices have their columns sorted by group (GPTQ's act-order), which GGUF"
            f" cannot say: {unnamed[0]}, ...; nothing was written\nchoices:\n"
            "  --encoding f32     exact, in the order of the inputs\n"
            "  --encoding NAME    f16, q8_0, q4_1, ...: made anew from the values"
        )
    tensors = {
        name: _in_order(tensor, checkpoint.tensors[weights[name]]) if name in weights else tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in names
    }
    note = f"{len(names)} matrices have their columns back in the order of the inputs (GPTQ's act-order)"
    return replace(checkpoint, tensors=tensors), [note]


def _in_order(weight: Tensor, permutation: Tensor) -> Tensor:
    """The matrix as float32 for inputs that are not permuted."""
    rows, columns = weight.shape

    def data() -> Bytes:
        order = permutation.data.view("<i4")
        back = np.empty(columns, np.int64)
        back[order] = np.arange(columns)
        source = weight.data
        row_bytes = source.size // rows
        out = np.empty((rows, columns), np.float32)
        step = max(1, (1 << 21) // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = weight.encoding.dequantize(source[start * row_bytes : stop * row_bytes])
            out[start:stop] = part.reshape(-1, columns)[:, back]
        flat: Bytes = out.reshape(math.prod(weight.shape)).view(np.uint8)
        return flat

    return weight.changed(encoding=encoding("f32"), data=data)
