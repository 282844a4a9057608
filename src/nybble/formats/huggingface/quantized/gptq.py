"""GPTQ: codes of 2, 3, 4 or 8 bits packed along the input features, with and without act-order.

    qweight i32 (K * bits / 32, N)      qzeros i32 (G, N * bits / 32)      scales f16 (G, N)
    g_idx   i32 (K): the group of each input feature

K input features in G groups, N output features; value = (code - zero point) * scale. Format ``gptq``
stores zero points less one, ``gptq_v2`` as they are.

With act-order a group is no neighbours: ``g_idx`` jumps. Such a weight becomes one with its columns
sorted by group, and ``X.input_permutation`` says which input feature each column takes.

Sources: arXiv:2210.17323, the linears of https://github.com/AutoGPTQ/AutoGPTQ (auto_gptq/nn_modules/qlinear)
and of https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import BITS, AffineFormat, AffineParts
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.huggingface.quantized.modules import (
    EMBEDDING,
    PERMUTATION,
    SCALE_TYPES,
    Pieces,
    QuantizedLinear,
    affine_weight,
    common_group_size,
    matches,
    plain_linears,
    quantized_linears,
    replaced,
    sorted_columns,
    symmetric,
    written,
)
from nybble.formats.huggingface.quantized.packing import (
    flat,
    items_of,
    pack_rows,
    unpack_rows,
    words_for,
    words_of,
)

Bytes = npt.NDArray[np.uint8]

PIECES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
FORMATS = ("gptq", "gptq_v2")
WHERE = "quantization_config"

# What GPTQModel adds to whole words of zero points, carries included, to undo what it took off when it
# wrote the file: exact also where a zero point is 0. Its words for 3 bits are no ones at the codes'
# lowest bits, but the same both ways.
_WORD_OFFSETS: Mapping[int, tuple[int, ...]] = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


@dataclass(frozen=True)
class Settings:
    """What the config says of one linear."""

    bits: int
    group_size: int
    format: str
    from_gptqmodel: bool
    """Whether GPTQModel wrote the file."""


# -- reading -----------------------------------------------------------------------------------------


def read_gptq(raw: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, Tensor]:
    """Canonical tensors of a GPTQ checkpoint; ``config``: its ``quantization_config``.

    Raises:
        FormatError: a piece is missing, left over, of a wrong shape, or ``g_idx`` makes no equal groups.
        UnsupportedError: another format or width.
    """
    settings = _settings(config)
    overrides = config.get("dynamic") or {}
    if not isinstance(overrides, Mapping):
        raise FormatError(f"{WHERE}: dynamic must be a mapping")

    def read(pieces: Pieces) -> Iterator[Tensor]:
        yield from _read_linear(pieces, _for_module(settings, overrides, pieces.module))

    return replaced(raw, lambda module, piece: piece in PIECES, read)


def _settings(config: Mapping[str, object]) -> Settings:
    fields = Fields(config, WHERE)
    name = fields.string("checkpoint_format", fields.string("format", "gptq")).lower()
    if name not in FORMATS:
        raise fields.unsupported("checkpoint_format", f"is {name!r}; known: {', '.join(FORMATS)}")
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer")) if isinstance(meta, Mapping) else ""
    settings = Settings(
        bits=fields.integer("bits"),
        group_size=fields.integer("group_size", 128, minimum=-1),
        format=name,
        from_gptqmodel="gptqmodel" in quantizer.lower(),
    )
    return _checked(settings, WHERE)


def _checked(settings: Settings, where: str) -> Settings:
    if settings.bits not in BITS:
        raise UnsupportedError(f"{where}: bits is {settings.bits}; known: {', '.join(map(str, BITS))}")
    if settings.group_size == 0:
        raise FormatError(f"{where}: group_size is 0")
    return settings


def _for_module(settings: Settings, overrides: Mapping[str, object], module: str) -> Settings:
    """With what ``dynamic`` says of modules whose name matches: the first one counts."""
    where = f"{WHERE}: dynamic"
    for pattern, values in overrides.items():
        if pattern.startswith("-:") or not matches(pattern.removeprefix("+:"), module, where):
            continue
        fields = Fields(values if isinstance(values, Mapping) else {}, f"{where} for {module}")
        bits = fields.integer("bits", settings.bits)
        group_size = fields.integer("group_size", settings.group_size, minimum=-1)
        return _checked(replace(settings, bits=bits, group_size=group_size), where)
    return settings


def _read_linear(pieces: Pieces, settings: Settings) -> Iterator[Tensor]:
    bits = settings.bits
    qweight = pieces.take("qweight", ("i32",))
    words, rows = qweight.shape
    columns = words * 32 // bits
    size = columns if settings.group_size == -1 else settings.group_size
    if words * 32 % bits or columns % size or rows * bits % 32:
        raise pieces.error(
            "qweight",
            f"shape {qweight.shape} does not fit {bits} bits in whole words and groups of {size}",
        )
    groups = columns // size
    scales = pieces.take("scales", SCALE_TYPES, (groups, rows))
    qzeros = pieces.take("qzeros", ("i32",), (groups, words_for(rows, bits)))
    order = None
    if pieces.has("g_idx"):
        order = sorted_columns(pieces.take("g_idx", ("i32", "i64"), (columns,)), groups)

    def zero_points() -> Bytes:
        points = _zero_points(qzeros, rows, settings)
        if points.max(initial=0) > 255:
            raise pieces.error("qzeros", "has a zero point of 256, which kernels disagree about")
        return np.ascontiguousarray(points.T).astype(np.uint8)

    form = AffineFormat(bits, size, scales.encoding.name, False)
    with_zeros = not symmetric(zero_points(), form)

    def parts() -> AffineParts:
        # Words are transposed, not codes: a quarter or less of the bytes.
        codes = unpack_rows(np.ascontiguousarray(words_of(qweight).T), bits, columns)
        return AffineParts(
            codes if order is None else codes[:, order],
            items_of(scales).transpose(1, 0, 2),
            zero_points() if with_zeros else None,
        )

    form = replace(form, has_zero_point=with_zeros)
    yield affine_weight(pieces.module, (rows, columns), form, parts)
    if order is not None:
        yield Tensor(f"{pieces.module}.{PERMUTATION}", (columns,), encoding("i32"), flat(order.astype("<i4")))


def _zero_points(qzeros: Tensor, rows: int, settings: Settings) -> npt.NDArray[np.int16]:
    """(groups, N). Less one as stored means 1 to 2 ** bits: kernels add the one after unpacking."""
    words = words_of(qzeros)
    add = settings.format == "gptq"
    if add and settings.from_gptqmodel:
        offsets = np.array(_WORD_OFFSETS[settings.bits], "<u4")
        words = words + np.resize(offsets, words.shape[1])
    points = unpack_rows(words, settings.bits, rows).astype(np.int16)
    return points + np.int16(1) if add and not settings.from_gptqmodel else points


# -- writing -----------------------------------------------------------------------------------------


def pack_gptq(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Pieces and ``quantization_config``.

    Format ``gptq`` where zero points are symmetric, which every program reads, and where the model came
    from a file of that format; otherwise ``gptq_v2``, for ``gptq`` has no zero point 0.

    Raises:
        UnsupportedError: GPTQ cannot hold a tensor; the message names it and says why.
    """
    linears = quantized_linears(checkpoint, "GPTQ")
    first = next(iter(linears.values()))
    for linear in linears.values():
        if linear.module == EMBEDDING:
            raise linear.refuse("GPTQ", "packs linears only")
        if linear.form.bits != first.form.bits:
            raise linear.refuse("GPTQ", f"has one width for all weights; {first.tensor.name} has another")
        if linear.form.scale == "f32":
            raise linear.refuse("GPTQ", "has float16 or bfloat16 scales")
        for what, count in (("input", linear.columns), ("output", linear.rows)):
            if count * linear.form.bits % 32:
                raise linear.refuse("GPTQ", f"packs whole words; {count} {what} features are none")
    bits = first.form.bits
    is_symmetric = not any(linear.form.has_zero_point for linear in linears.values())
    name = "gptq" if (is_symmetric and bits != 3) or _came_as_gptq(checkpoint) else "gptq_v2"
    config: dict[str, object] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": common_group_size("GPTQ", linears),
        "desc_act": any(linear.permutation is not None for linear in linears.values()),
        "sym": is_symmetric,
        "lm_head": "lm_head" in linears,
        "checkpoint_format": name,
    }
    plain = [module for module in plain_linears(checkpoint, linears) if module != "lm_head"]
    if plain:
        config["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in plain}

    def pack(linear: QuantizedLinear, parts: Callable[[], AffineParts]) -> Iterator[Tensor]:
        return _write_linear(linear, parts, less=int(name == "gptq"))

    return written(checkpoint, linears, pack), config


def _came_as_gptq(checkpoint: Checkpoint) -> bool:
    values = checkpoint.metadata.get("huggingface.config")
    config = values.get("quantization_config") if isinstance(values, Mapping) else None
    if not isinstance(config, Mapping) or config.get("quant_method") != "gptq":
        return False
    meta = config.get("meta")
    if isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer")).lower():
        return False
    return str(config.get("checkpoint_format", config.get("format", "gptq"))).lower() == "gptq"


def _write_linear(
    linear: QuantizedLinear, parts: Callable[[], AffineParts], *, less: int
) -> Iterator[Tensor]:
    bits, groups = linear.form.bits, linear.groups
    columns, rows = linear.columns, linear.rows

    def order() -> npt.NDArray[np.int64]:
        if linear.permutation is None:
            return np.arange(columns)
        return np.ascontiguousarray(linear.permutation.data).view("<i4").astype(np.int64)

    def qweight() -> Bytes:
        codes = parts().codes
        if linear.permutation is not None:
            codes = codes[:, np.argsort(order())]
        return flat(pack_rows(codes, bits).T)

    def qzeros() -> Bytes:
        points = parts().zero_points
        if points is None:
            points = np.full((rows, groups), linear.form.middle, np.uint8)
        low, high = int(points.min()) - less, int(points.max()) - less
        if low < 0 or high >= 2**bits:
            raise linear.refuse(
                "GPTQ", f"has zero points {less} to {2**bits - 1 + less} in this format; one here is"
                f" {int(points.min()) if low < 0 else int(points.max())}",
            )  # fmt: skip
        return flat(pack_rows(np.ascontiguousarray((points - np.uint8(less)).T), bits))

    def scales() -> Bytes:
        return flat(parts().scales.transpose(1, 0, 2))

    def g_idx() -> Bytes:
        index = np.empty(columns, "<i4")
        index[order()] = np.arange(columns) // linear.form.group_size
        return flat(index)

    i32 = encoding("i32")
    yield Tensor(f"{linear.module}.qweight", (words_for(columns, bits), rows), i32, qweight)
    yield Tensor(f"{linear.module}.qzeros", (groups, words_for(rows, bits)), i32, qzeros)
    yield Tensor(f"{linear.module}.scales", (groups, rows), encoding(linear.form.scale), scales)
    yield Tensor(f"{linear.module}.g_idx", (columns,), i32, g_idx)
