"""Packing: codes of 2, 3, 4 or 8 bits one after another in little-endian 32-bit words.

GPTQ and compressed-tensors mean the same dense order: code i of a row takes bits ``i * bits`` upward
of the row's words, and a code of 3 bits may lie in two of them. In memory that is a stream of bits,
lowest first, whatever the width of a word is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.encodings.blocks import fields
from nybble.checkpoint.tensor import Tensor

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

_CHUNK = 1 << 22  # codes of 3 bits unpacked at a time: each takes 3 bytes on the way


def words_for(codes: int, bits: int) -> int:
    """32-bit words that a row of codes takes."""
    return -(-codes * bits // 32)


def unpack_rows(words: Words, bits: int, codes: int) -> Bytes:
    """Codes of each row: ``words`` (rows, words_for(codes, bits)) to uint8 (rows, codes)."""
    rows = len(words)
    packed = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8).reshape(rows, -1)
    if bits == 8:
        return packed[:, :codes]
    if bits in (2, 4):
        return fields(packed, bits)[:, :codes]
    out = np.empty((rows, codes), np.uint8)
    step = max(1, _CHUNK // max(1, codes))
    for start in range(0, rows, step):
        stream = np.unpackbits(packed[start : start + step], axis=1, count=codes * bits, bitorder="little")
        part = np.packbits(stream.reshape(len(stream), codes, bits), axis=-1, bitorder="little")
        out[start : start + step] = part[..., 0]
    return out


def pack_rows(codes: Bytes, bits: int) -> Words:
    """The reverse of ``unpack_rows``; bits that no code takes are 0."""
    rows, count = codes.shape
    words = words_for(count, bits)
    out = np.zeros((rows, 4 * words), np.uint8)
    step = max(1, _CHUNK // max(1, count))
    for start in range(0, rows, step):
        part = codes[start : start + step]
        if bits == 8:
            packed = part
        elif bits == 4 and count % 2 == 0:
            packed = part[:, ::2] | (part[:, 1::2] << np.uint8(4))
        else:
            stream = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little")
            packed = np.packbits(stream.reshape(len(part), count * bits), axis=1, bitorder="little")
        out[start : start + step, : packed.shape[1]] = packed
    return out.view("<u4").reshape(rows, words)


def words_of(tensor: Tensor) -> Words:
    """An i32 matrix as unsigned words in its shape."""
    return np.ascontiguousarray(tensor.data).view("<u4").reshape(tensor.shape)


def items_of(tensor: Tensor) -> Bytes:
    """A matrix of a plain encoding as the bytes of its items: uint8 (rows, columns, bytes)."""
    return tensor.data.reshape(*tensor.shape, tensor.encoding.block_bytes)


def flat(array: npt.NDArray[np.generic]) -> Bytes:
    """Flat little-endian bytes, as ``Tensor.data`` wants them."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
