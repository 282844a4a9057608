"""Scales in a smaller type, exactly or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.base import Bytes
from nybble.convert.transcode.groups import refuse


def narrowed(values: npt.NDArray[np.floating[Any]], what: str = "scale") -> npt.NDArray[np.float16]:
    """The values (n,) as float16.

    Raises:
        DoesNotFit: one of them is not a float16.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    refuse(half.astype(values.dtype) != values, f"its {what} is not a float16")
    return half


def scale_bytes(scales: npt.NDArray[np.float32], kind: str, what: str = "scale") -> Bytes:
    """Scales or minima (n,) as the bytes of ``f32``, ``f16`` or ``bf16``: uint8 (n, bytes).

    Raises:
        DoesNotFit: one of them is not a number of that type.
    """
    if kind == "f16":
        return narrowed(scales, what).astype("<f2").view(np.uint8).reshape(-1, 2)
    raw = scales.astype("<f4").view(np.uint8).reshape(-1, 4)
    if kind == "f32":
        return raw
    refuse((raw[:, :2] != 0).any(axis=1), f"its {what} is not a bfloat16")
    return np.ascontiguousarray(raw[:, 2:])
