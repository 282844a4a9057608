"""The keys ``general.*`` that follow from the tensors: file type, size label; and sampling advice.

Names and numbers: ``LlamaFileType`` and ``Keys.General`` in llama.cpp's ``gguf-py/gguf/constants.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from nybble.checkpoint.tensor import Tensor

QUANTIZATION_VERSION = 2
"""Of the block types: the one that all current tools read."""

_PLAIN = ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64")

# file type -> the encoding that most weights have. Types with letters are mixes of K types.
_MAIN_ENCODING: Mapping[int, str] = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    7: "q8_0",
    8: "q5_0",
    9: "q5_1",
    10: "q2_k",
    11: "q3_k",
    12: "q3_k",
    13: "q3_k",
    14: "q4_k",
    15: "q4_k",
    16: "q5_k",
    17: "q5_k",
    18: "q6_k",
    19: "iq2_xxs",
    20: "iq2_xs",
    21: "q2_k",
    22: "iq3_xxs",
    23: "iq3_xxs",
    24: "iq1_s",
    25: "iq4_nl",
    26: "iq3_s",
    27: "iq3_s",
    28: "iq2_s",
    29: "iq2_s",
    30: "iq4_xs",
    31: "iq1_m",
    32: "bf16",
    36: "tq1_0",
    37: "tq2_0",
    38: "mxfp4",
    39: "nvfp4",
    40: "q1_0",
}
_SMALL = {"q3_k": 11, "q4_k": 14, "q5_k": 16}
_MEDIUM = {"q3_k": 12, "q4_k": 15, "q5_k": 17}
"""With a better type mixed in."""


def file_type(tensors: Iterable[Tensor]) -> int | None:
    """``general.file_type`` of these tensors (GGUF names); None where there is no number for it.

    The encoding with most elements among the layers' matrices decides.
    """
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            elements[tensor.encoding.name] += math.prod(tensor.shape)
    if not elements:
        return None
    main = max(sorted(elements), key=lambda name: elements[name])
    if main in _MEDIUM:
        better = {"q3_k": ("q4_k", "q5_k", "q6_k"), "q4_k": ("q5_k", "q6_k"), "q5_k": ("q6_k",)}[main]
        return (_MEDIUM if any(name in elements for name in better) else _SMALL)[main]
    return next((number for number, name in _MAIN_ENCODING.items() if name == main), None)


def fits_file_type(number: object, tensors: Iterable[Tensor]) -> bool:
    """Whether a file's own statement can stand: some matrix has the encoding that it names.

    Mixes have rules that tensors do not show (Q4_K_M falls back to Q5_0 in rows that 256 does not
    divide), so a statement that is not refuted is kept.
    """
    main = _MAIN_ENCODING.get(number) if isinstance(number, int) else None
    return any(tensor.encoding.name == main for tensor in tensors if len(tensor.shape) > 1)


def is_quantized(tensors: Iterable[Tensor]) -> bool:
    """Whether a tensor has a block type."""
    return any(tensor.encoding.name not in _PLAIN for tensor in tensors)


def size_label(tensors: Iterable[Tensor]) -> str:
    """The number of weights in words: ``135M``, ``1.1B``."""
    count = float(sum(math.prod(tensor.shape) for tensor in tensors))
    units = ["", "K", "M", "B", "T"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    text = f"{count:.1f}" if units[0] and count < 9.95 else f"{count:.0f}"
    return text.removesuffix(".0") + units[0]


# generation_config.json -> general.sampling.*, as convert_hf_to_gguf.py has it.
_SAMPLING: Mapping[str, tuple[str, type]] = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temperature": ("temp", float),
    "repetition_penalty": ("penalty_repeat", float),
}


def sampling_keys(generation_config: object) -> dict[str, object]:
    """The recommendations of a ``generation_config.json`` that GGUF has keys for."""
    if not isinstance(generation_config, Mapping) or generation_config.get("do_sample") is False:
        return {}
    keys: dict[str, object] = {}
    for name, (key, kind) in _SAMPLING.items():
        value = generation_config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            keys[f"general.sampling.{key}"] = np.int32(value) if kind is int else float(value)
    return keys
