"""AWQ: 4-bit codes with zero points, packed along the output features (``gemm``) or the input (``gemv``).

    gemm   qweight i32 (K, N / 8)   qzeros i32 (K / g, N / 8)   scales f16 (K / g, N)
           of eight output features of a word, feature 0 2 4 6 1 3 5 7 takes nibble 0 .. 7, lowest first
    gemv   qweight i32 (N, K / 8)   qzeros i32 (N, Z)   scales f16 (N, 8 Z): in order, rows filled up
           to Z words

K input features in groups of g, N output features; value = (code - zero point) * scale.

Source: the linears of https://github.com/casper-hansen/AutoAWQ (awq/modules/linear), arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import AffineFormat, AffineParts
from nybble.checkpoint.tensor import Tensor
from nybble.formats.fields import Fields
from nybble.formats.huggingface.quantized.modules import (
    EMBEDDING,
    SCALE_TYPES,
    Pieces,
    QuantizedLinear,
    affine_weight,
    common_group_size,
    plain_linears,
    quantized_linears,
    replaced,
    symmetric,
    written,
)
from nybble.formats.huggingface.quantized.packing import (
    Words,
    flat,
    items_of,
    unpack_rows,
    words_for,
    words_of,
)

Bytes = npt.NDArray[np.uint8]

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Feature of each nibble of a word (gemm)."""
PIECES = frozenset({"qweight", "qzeros", "scales"})


def read_awq(raw: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, Tensor]:
    """Canonical tensors of an AWQ checkpoint; ``config``: its ``quantization_config``.

    Raises:
        FormatError: a piece is missing, left over or of a wrong shape.
        UnsupportedError: another version of the packing.
    """
    fields = Fields(config, "quantization_config")
    version = fields.string("version", fields.string("format", "gemm")).lower()
    if version == "gemv_fast" or fields.string("backend", "") == "llm-awq" or version == "llm-awq":
        raise fields.unsupported(
            "version", "is gemv_fast, whose zero points are stored multiplied with the scale and rounded"
        )
    readers = {"gemm": _read_gemm, "gemv": _read_gemv}
    if version not in readers:
        raise fields.unsupported("version", f"is {version!r}; known: {', '.join(readers)}")
    bits = fields.integer("bits", fields.integer("w_bit", BITS))
    if bits != BITS:
        raise fields.unsupported("bits", f"is {bits}; AWQ has 4")
    group_size = fields.integer("group_size", fields.integer("q_group_size", 128, minimum=-1), minimum=-1)
    if group_size == 0:
        raise fields.error("group_size", "is 0")

    def read(pieces: Pieces) -> Iterator[Tensor]:
        yield readers[version](pieces, group_size)

    return replaced(raw, lambda module, piece: piece in PIECES, read)


def pack_awq(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Pieces in version gemm, and ``quantization_config``.

    Raises:
        UnsupportedError: AWQ cannot hold a tensor; the message names it and says why.
    """
    linears = quantized_linears(checkpoint, "AWQ")
    for linear in linears.values():
        if linear.module in (EMBEDDING, "lm_head"):
            raise linear.refuse("AWQ", "packs the linears of the layers only")
        if linear.form.bits != BITS:
            raise linear.refuse("AWQ", "has 4 bits only")
        if linear.form.scale != "f16":
            raise linear.refuse("AWQ", "has float16 scales")
        if linear.permutation is not None:
            raise linear.refuse("AWQ", "has no order of columns of its own (act-order)")
        if linear.rows % 8:
            raise linear.refuse(
                "AWQ", f"packs 8 output features to a word; {linear.rows} are not whole words"
            )
    group_size = common_group_size("AWQ", linears)
    config: dict[str, object] = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
    }
    plain = [name for name in plain_linears(checkpoint, linears) if name != "lm_head"]
    if plain:
        config["modules_to_not_convert"] = [*plain, "lm_head"]
    return written(checkpoint, linears, _write_gemm), config


# -- gemm --------------------------------------------------------------------------------------------


def _read_gemm(pieces: Pieces, group_size: int) -> Tensor:
    qweight = pieces.take("qweight", ("i32",))
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    size = _group(pieces, columns, group_size)
    scales = pieces.take("scales", SCALE_TYPES, (columns // size, rows))
    qzeros = pieces.take("qzeros", ("i32",), (columns // size, rows // 8))

    def zero_points() -> Bytes:
        return _features(words_of(qzeros))

    def parts(with_zeros: bool) -> AffineParts:
        return AffineParts(
            _features(words_of(qweight)),
            items_of(scales).transpose(1, 0, 2),
            zero_points() if with_zeros else None,
        )

    return _weight(pieces, (rows, columns), size, scales, zero_points=zero_points, parts=parts)


def _features(words: Words) -> Bytes:
    """Codes of each output feature: ``words`` (n, N / 8) to uint8 (N, n)."""
    turned = np.ascontiguousarray(words.T)  # words, not codes: an eighth of the items
    packed = turned.astype("<u4", copy=False).view(np.uint8).reshape(*turned.shape, 4)
    out = np.empty((len(turned), 8, turned.shape[1]), np.uint8)
    for place, feature in enumerate(ORDER):
        half = packed[..., place // 2]
        out[:, feature] = half >> np.uint8(4) if place % 2 else half & np.uint8(15)
    return out.reshape(-1, turned.shape[1])


def _words(codes: Bytes) -> Words:
    """The reverse of ``_features``."""
    features = codes.reshape(-1, 8, codes.shape[1])
    packed = np.empty((len(features), codes.shape[1], 4), np.uint8)
    for byte in range(4):
        low, high = ORDER[2 * byte], ORDER[2 * byte + 1]
        packed[..., byte] = features[:, low] | (features[:, high] << np.uint8(4))
    return np.ascontiguousarray(packed.view("<u4")[..., 0].T)


def _write_gemm(linear: QuantizedLinear, parts: Callable[[], AffineParts]) -> Iterator[Tensor]:
    groups = linear.groups

    def qweight() -> Bytes:
        return flat(_words(parts().codes))

    def qzeros() -> Bytes:
        points = parts().zero_points
        if points is None:
            points = np.full((linear.rows, groups), linear.form.middle, np.uint8)
        if int(points.max()) > 15:
            raise linear.refuse("AWQ", f"has zero points of 4 bits; one here is {int(points.max())}")
        return flat(_words(points))

    def scales() -> Bytes:
        return flat(parts().scales.transpose(1, 0, 2))

    i32 = encoding("i32")
    yield Tensor(f"{linear.module}.qweight", (linear.columns, linear.rows // 8), i32, qweight)
    yield Tensor(f"{linear.module}.qzeros", (groups, linear.rows // 8), i32, qzeros)
    yield Tensor(f"{linear.module}.scales", (groups, linear.rows), encoding(linear.form.scale), scales)


# -- gemv --------------------------------------------------------------------------------------------


def _read_gemv(pieces: Pieces, group_size: int) -> Tensor:
    qweight = pieces.take("qweight", ("i32",))
    rows, columns = qweight.shape[0], qweight.shape[1] * 8
    size = _group(pieces, columns, group_size)
    groups = columns // size
    # Kernels read the zero points of several groups at a time: rows are filled up for them.
    multiple = {32: 4, 64: 2}.get(size, 1)
    words = -(-words_for(groups, BITS) // multiple) * multiple
    scales = pieces.take("scales", SCALE_TYPES, (rows, words * 8))
    qzeros = pieces.take("qzeros", ("i32",), (rows, words))

    def zero_points() -> Bytes:
        return np.ascontiguousarray(unpack_rows(words_of(qzeros), BITS, groups))

    def parts(with_zeros: bool) -> AffineParts:
        codes = unpack_rows(words_of(qweight), BITS, columns)
        return AffineParts(codes, items_of(scales)[:, :groups], zero_points() if with_zeros else None)

    return _weight(pieces, (rows, columns), size, scales, zero_points=zero_points, parts=parts)


def _group(pieces: Pieces, columns: int, group_size: int) -> int:
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise pieces.error("qweight", f"{columns} input features are not whole groups of {size}")
    return size


def _weight(
    pieces: Pieces,
    shape: tuple[int, int],
    size: int,
    scales: Tensor,
    *,
    zero_points: Callable[[], Bytes],
    parts: Callable[[bool], AffineParts],
) -> Tensor:
    form = AffineFormat(BITS, size, scales.encoding.name, False)
    with_zeros = not symmetric(zero_points(), form)
    form = AffineFormat(BITS, size, scales.encoding.name, with_zeros)
    return affine_weight(pieces.module, shape, form, lambda: parts(with_zeros))
