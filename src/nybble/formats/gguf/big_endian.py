"""Tensor data of big-endian GGUF files, turned into the little-endian form of the encodings table.

A block type is swapped where its numbers of several bytes are plain fields of the C structure.
Types whose bytes are read as wider numbers than they are declared (q5_0's ``qh``, codes of iq2_xxs)
have no agreed big-endian form, and no known tool writes them: they are refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings import Encoding
from nybble.errors import UnsupportedError

# Fields of a block to swap: (first byte, end, width). Types with neither are bytes only.
_FIELDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "f32": ((0, 4, 4),),
    "f16": ((0, 2, 2),),
    "bf16": ((0, 2, 2),),
    "f64": ((0, 8, 8),),
    "i8": (),
    "i16": ((0, 2, 2),),
    "i32": ((0, 4, 4),),
    "i64": ((0, 8, 8),),
    "q4_0": ((0, 2, 2),),
    "q4_1": ((0, 4, 2),),
    "q8_0": ((0, 2, 2),),
    "q8_1": ((0, 4, 2),),
    "q1_0": ((0, 2, 2),),
    "q2_0": ((0, 2, 2),),
    "q2_k": ((80, 84, 2),),
    "q3_k": ((108, 110, 2),),
    "q4_k": ((0, 4, 2),),
    "q5_k": ((0, 4, 2),),
    "q6_k": ((208, 210, 2),),
    "q8_k": ((0, 4, 4), (260, 292, 2)),
    "iq2_s": ((0, 2, 2),),
    "iq3_s": ((0, 2, 2),),
    "iq4_nl": ((0, 2, 2),),
    "iq4_xs": ((0, 4, 2),),
    "tq1_0": ((52, 54, 2),),
    "tq2_0": ((64, 66, 2),),
    "mxfp4": (),
    "nvfp4": (),
}


def to_little_endian(data: npt.NDArray[np.uint8], encoding: Encoding, where: str) -> npt.NDArray[np.uint8]:
    """A copy of whole blocks with their fields swapped; read-only.

    Raises:
        UnsupportedError: the type has no agreed big-endian form.
    """
    fields = _FIELDS.get(encoding.name)
    if fields is None:
        raise UnsupportedError(
            f"{where}: {encoding.name} in a big-endian file cannot be read;"
            f" these types can: {', '.join(_FIELDS)}"
        )
    blocks: npt.NDArray[np.uint8] = data.reshape(-1, encoding.block_bytes).copy()
    for start, stop, width in fields:
        words = blocks[:, start:stop].reshape(len(blocks), -1, width)
        blocks[:, start:stop] = words[..., ::-1].reshape(len(blocks), -1)
    swapped: npt.NDArray[np.uint8] = blocks.reshape(-1)
    swapped.flags.writeable = False
    return swapped
