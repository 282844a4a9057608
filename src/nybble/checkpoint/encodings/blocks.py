"""What the decoders share: cutting bytes into blocks, fields of a block, and checks.

A decoder sees uint8 (blocks, block_bytes) and returns float32 (blocks, block_size). Everything
multi-byte is little-endian whatever the machine is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.base import Bytes, Encoding, Floats

_CHUNK = 1 << 20  # elements decoded at a time: keeps the intermediates in the cache


def block_encoding(
    name: str,
    block_size: int,
    block_bytes: int,
    decode: Callable[[Bytes], Floats],
    encode: Callable[[Floats], Bytes] | None = None,
    *,
    native: bool = False,
    ggml_type: int,
    layout: str,
    source: str,
) -> Encoding:
    """A row of the table from functions on whole blocks.

    ``decode`` maps uint8 (n, block_bytes) to float32 (n, block_size), ``encode`` the reverse, by which
    GGUF's own tools define it. ``native``: there is no such definition, and the native core's search for
    the blocks of smallest squared error is the quantizer (``nybble.quantize.blocks``).
    """
    step = max(1, _CHUNK // block_size)

    def dequantize(data: Bytes) -> Floats:
        flat = as_bytes(name, data)
        if flat.size % block_bytes:
            raise ValueError(
                f"{name}: {flat.size} bytes are not a multiple of the block's {block_bytes} bytes"
            )
        blocks = flat.reshape(-1, block_bytes)
        out = np.empty((len(blocks), block_size), dtype=np.float32)
        with np.errstate(all="ignore"):  # an infinite scale in the data is the data's business
            for start in range(0, len(blocks), step):
                out[start : start + step] = decode(np.ascontiguousarray(blocks[start : start + step]))
        return out.reshape(-1)

    def quantize(values: Floats) -> Bytes:
        flat = np.asarray(values, dtype=np.float32).reshape(-1)
        if flat.size % block_size:
            raise ValueError(
                f"{name}: {flat.size} elements are not a multiple of the block size {block_size}"
            )
        if not np.isfinite(flat).all():
            bad = int(np.flatnonzero(~np.isfinite(flat))[0])
            raise ValueError(f"{name}: element {bad} is {flat[bad]}; only finite values can be quantized")
        rows = np.ascontiguousarray(flat.reshape(-1, block_size))
        out = np.empty((len(rows), block_bytes), dtype=np.uint8)
        if encode is None:
            from nybble import _core

            wrong = _core.quantize_blocks(name, rows, None, 1, out.reshape(-1))
            if wrong:
                largest = np.abs(flat).max()
                raise ValueError(
                    f"{name}: a scale does not fit in float16; the largest magnitude is {largest:g}"
                )
            return out.reshape(-1)
        for start in range(0, len(rows), step):
            out[start : start + step] = encode(rows[start : start + step])
        return out.reshape(-1)

    return Encoding(
        name=name,
        block_size=block_size,
        block_bytes=block_bytes,
        dequantize=dequantize,
        quantize=quantize if encode is not None or native else None,
        layout=layout,
        source=source,
        ggml_type=ggml_type,
    )


def as_bytes(name: str, data: Bytes) -> Bytes:
    """``data`` as flat uint8.

    Raises:
        TypeError: it is of another dtype.
    """
    if data.dtype != np.uint8:
        raise TypeError(f"{name}: encoded data must be uint8, not {data.dtype}")
    return data.reshape(-1)


def f16(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte ``start`` of every block: float32 (n, 1)."""
    return words(blocks, start, start + 2, "<f2").astype(np.float32)


def words(blocks: Bytes, start: int, stop: int, dtype: str) -> npt.NDArray[np.generic]:
    """Bytes ``start`` to ``stop`` of every block, read as ``dtype``: (n, count)."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def u16(blocks: Bytes, start: int, stop: int) -> npt.NDArray[np.int32]:
    """Bytes ``start`` to ``stop`` of every block as 16-bit numbers: int32 (n, count)."""
    return words(blocks, start, stop, "<u2").astype(np.int32)


def u32(blocks: Bytes, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Bytes ``start`` to ``stop`` of every block as 32-bit numbers: int64 (n, count)."""
    return words(blocks, start, stop, "<u4").astype(np.int64)


def planes(data: Bytes, width: int) -> Bytes:
    """Fields of ``width`` bits, lowest first, as a new axis before the last.

    (..., k) becomes (..., 8 / width, k): plane ``i`` holds bits ``i * width`` upward of each byte.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
    return (data[..., None, :] >> shifts) & np.uint8((1 << width) - 1)


def fields(data: Bytes, width: int) -> Bytes:
    """Fields of ``width`` bits, lowest first, one after another: (..., k) to (..., k * 8 / width)."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    split = (data[..., None] >> shifts) & np.uint8((1 << width) - 1)
    return split.reshape(*data.shape[:-1], -1)


def signs_of(bits: Bytes) -> Floats:
    """+1 where a bit is 0 and -1 where it is 1: (..., k) bytes to float32 (..., 8 k)."""
    return np.float32(1) - np.float32(2) * fields(bits, 1).astype(np.float32)


def inverse(scale: Floats) -> Floats:
    """1 / scale; 0 where the scale is 0 or so small that its inverse is infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        result = np.float32(1) / scale
    return np.where(np.isfinite(result), result, np.float32(0))


def to_f16(name: str, values: Floats) -> Bytes:
    """float32 (n, 1) as the bytes of float16: uint8 (n, 2).

    Raises:
        ValueError: a value is too large for float16.
    """
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        bad = int(np.flatnonzero(~np.isfinite(half))[0])
        raise ValueError(
            f"{name}: scale or minimum {values.reshape(-1)[bad]} does not fit in float16 (max 65504)"
        )
    return half.view(np.uint8).reshape(len(values), -1)
