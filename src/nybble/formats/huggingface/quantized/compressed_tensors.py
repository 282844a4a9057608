"""compressed-tensors: integer weights as vLLM's tools write them.

    pack-quantized    weight_packed i32 (N, K * bits / 32), codes in order; weight_shape (2,);
                      weight_zero_point i32 (N * bits / 32, G), packed along N; weight_g_idx i32 (K)
    int-quantized     weight i8 (N, K), weight_zero_point i8 (N, G)
    naive-quantized   the same

and weight_scale (N, G) in any float type. N output and K input features, G groups of a row; one
(``channel``), or one for the whole matrix (``tensor``). Stored codes and zero points are signed, packed
ones with 2 ** (bits - 1) added; value = (code - zero point) * scale.

How activations and caches are quantized does not change the weights: those settings are accepted and
not used (``unused_settings`` names them).

Source: https://github.com/vllm-project/compressed-tensors (compressors, quantization).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.encodings.affine import BITS, AffineFormat, AffineParts
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError
from nybble.formats.fields import Fields
from nybble.formats.huggingface.quantized.modules import (
    EMBEDDING,
    PERMUTATION,
    SCALE_TYPES,
    Pieces,
    QuantizedLinear,
    affine_weight,
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
    pack_rows,
    unpack_rows,
    words_for,
    words_of,
)

Bytes = npt.NDArray[np.uint8]

WHERE = "quantization_config"
PACKED, PLAIN = ("pack-quantized",), ("int-quantized", "naive-quantized")
STRATEGIES = ("group", "channel", "tensor")
PIECES = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"})
UNUSED_PIECES = frozenset(
    f"{what}_{value}" for what in ("input", "output", "q", "k", "v") for value in ("scale", "zero_point")
)
"""Static scales of activations and caches."""


@dataclass(frozen=True)
class Scheme:
    """One of the config's groups."""

    name: str
    targets: tuple[str, ...]
    format: str
    bits: int
    strategy: str
    group_size: int
    """Input features that share a scale; 0 where all of a row do."""
    symmetric: bool


# -- reading -----------------------------------------------------------------------------------------


def read_compressed_tensors(raw: Mapping[str, Tensor], config: Mapping[str, object]) -> dict[str, Tensor]:
    """Canonical tensors of a compressed-tensors checkpoint; ``config``: its ``quantization_config``.

    Raises:
        FormatError: a piece is missing, left over or of a wrong shape, or no group of the config is
            meant for a quantized weight.
        UnsupportedError: a format other than those of integers.
    """
    schemes = _schemes(config)
    # Plain formats keep the name X.weight: the scale beside it tells.
    scaled = {name.removesuffix("_scale") for name in raw if name.endswith(".weight_scale")}
    for name, tensor in raw.items():
        if name.endswith(".weight") and tensor.encoding.name == "i8" and name not in scaled:
            raise FormatError(f"{name}_scale: is missing beside {name}, whose values are integers")

    def is_piece(module: str, piece: str) -> bool:
        return (
            piece in PIECES or piece in UNUSED_PIECES or (piece == "weight" and f"{module}.weight" in scaled)
        )

    def read(pieces: Pieces) -> Iterator[Tensor]:
        pieces.drop(UNUSED_PIECES)
        if not pieces.has_any():
            return  # the scales of a cache, beside no weight
        scheme = _scheme_for(schemes, pieces.module)
        yield from (_read_packed if scheme.format in PACKED else _read_plain)(pieces, scheme)

    return replaced(raw, is_piece, read)


def unused_settings(config: Mapping[str, object]) -> tuple[str, ...]:
    """What a compressed-tensors config asks for that the weights do not show: for a report."""
    groups = config.get("config_groups")
    found = []
    for key in ("input_activations", "output_activations"):
        schemes = groups.values() if isinstance(groups, Mapping) else ()
        if any(isinstance(scheme, Mapping) and scheme.get(key) for scheme in schemes):
            found.append(key)
    return (*found, *(["kv_cache_scheme"] if config.get("kv_cache_scheme") else []))


def _schemes(config: Mapping[str, object]) -> list[Scheme]:
    fields = Fields(config, WHERE)
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and str(sparsity.get("format", "dense")) != "dense":
        raise fields.unsupported("sparsity_config", f"has the format {sparsity.get('format')!r}")
    transforms = config.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise fields.unsupported("transform_config", "asks for rotations while the model runs")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.error("config_groups", "must be a mapping of at least one group")
    default = fields.string("format", "dense")
    schemes = []
    for name, values in groups.items():
        where = f"{WHERE}: config_groups.{name}"
        if isinstance(values, list):
            raise Fields({}, where).unsupported("", "names a preset; the group must be written out")
        if not isinstance(values, Mapping):
            raise FormatError(f"{where} must be a mapping")
        if values.get("weights") is not None:
            schemes.append(_scheme(str(name), values, default, where))
    if not schemes:
        raise fields.error("config_groups", "quantizes no weights")
    return schemes


def _scheme(name: str, values: Mapping[str, object], default: str, where: str) -> Scheme:
    fields = Fields(values, where)
    weights = fields.fields("weights")
    kind = fields.string("format", default)
    type_name = weights.string("type", "int")
    if kind not in PACKED + PLAIN or type_name != "int":
        raise fields.unsupported(
            "format", f"is {kind!r} of type {type_name!r}; known: {', '.join(PACKED + PLAIN)} of type 'int'"
        )
    bits = weights.integer("num_bits", 8)
    if bits not in BITS:
        raise weights.unsupported("num_bits", f"is {bits}; known: {', '.join(map(str, BITS))}")
    group_size = weights.integer("group_size", 0, minimum=-1)
    strategy = weights.string(
        "strategy", "group" if group_size > 0 else "channel" if group_size == -1 else "tensor"
    )
    if strategy not in STRATEGIES:
        raise weights.unsupported("strategy", f"is {strategy!r}; known: {', '.join(STRATEGIES)}")
    if (strategy == "group") != (group_size > 0):
        raise weights.error("group_size", f"is {group_size}, which does not fit the strategy {strategy!r}")
    targets = values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise fields.error("targets", "must be a list of names")
    is_symmetric = weights.boolean("symmetric", True)
    return Scheme(name, tuple(targets), kind, bits, strategy, max(group_size, 0), is_symmetric)


def _scheme_for(schemes: list[Scheme], module: str) -> Scheme:
    """By whole name, else by pattern, else by the module's class: as compressed-tensors looks."""
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    for scheme in schemes:
        if module in scheme.targets:
            return scheme
    for scheme in schemes:
        for target in scheme.targets:
            if target.startswith("re:") and matches(target[3:], module, f"{WHERE}: {scheme.name}"):
                return scheme
    for scheme in schemes:
        if kind in scheme.targets:
            return scheme
    raise FormatError(f"{module}: is quantized, but no group of {WHERE} has it among its targets")


def _read_packed(pieces: Pieces, scheme: Scheme) -> Iterator[Tensor]:
    bits = scheme.bits
    packed = pieces.take("weight_packed", ("i32",))
    stored = pieces.take("weight_shape", ("i64", "i32"), (2,))
    item = "<i8" if stored.encoding.name == "i64" else "<i4"
    rows, columns = (int(size) for size in np.ascontiguousarray(stored.data).view(item))
    if rows != packed.shape[0] or columns <= 0 or words_for(columns, bits) != packed.shape[1]:
        raise pieces.error(
            "weight_packed",
            f"shape {packed.shape} cannot hold {rows} x {columns} codes of {bits} bits (weight_shape)",
        )
    size, scales = _scales(pieces, scheme, rows, columns)
    groups = columns // size
    order = None
    if pieces.has("weight_g_idx"):
        index = pieces.take("weight_g_idx", ("i32", "i64"), (columns,))
        order = sorted_columns(index, groups, absent=-1)

    zero_points: Callable[[], Bytes] | None = None
    if pieces.has("weight_zero_point") and pieces.is_encoded("weight_zero_point", "i32"):
        words = pieces.take("weight_zero_point", ("i32",), (words_for(rows, bits), groups))

        def packed_zero_points() -> Bytes:
            unpacked = unpack_rows(np.ascontiguousarray(words_of(words).T), bits, rows)
            return np.ascontiguousarray(unpacked.T)

        zero_points = packed_zero_points
    else:
        zero_points = _plain_zero_points(pieces, scheme, rows, groups)

    def codes() -> Bytes:
        unpacked = unpack_rows(words_of(packed), bits, columns)
        return unpacked if order is None else unpacked[:, order]

    yield _weight(pieces, scheme, (rows, columns), scales, size=size, zero_points=zero_points, codes=codes)
    if order is not None:
        yield Tensor(f"{pieces.module}.{PERMUTATION}", (columns,), encoding("i32"), flat(order.astype("<i4")))


def _read_plain(pieces: Pieces, scheme: Scheme) -> Iterator[Tensor]:
    weight = pieces.take("weight", ("i8",))
    rows, columns = weight.shape
    size, scales = _scales(pieces, scheme, rows, columns)
    zero_points = _plain_zero_points(pieces, scheme, rows, columns // size)

    def codes() -> Bytes:
        return _unsigned(weight, scheme.bits).reshape(rows, columns)

    yield _weight(pieces, scheme, (rows, columns), scales, size=size, zero_points=zero_points, codes=codes)


def _scales(pieces: Pieces, scheme: Scheme, rows: int, columns: int) -> tuple[int, Tensor]:
    """Group size, and the scales: as stored, (N, G), (N, 1), (N,), (1,) or ()."""
    size = scheme.group_size or columns
    if columns % size:
        raise pieces.error("weight_scale", f"{columns} input features are not whole groups of {size}")
    shapes = _shapes(scheme, rows, columns // size)
    return size, pieces.take_one_of("weight_scale", SCALE_TYPES, shapes)


def _shapes(scheme: Scheme, rows: int, groups: int) -> tuple[tuple[int, ...], ...]:
    if scheme.strategy == "tensor":
        return (1,), (), (1, 1)
    return ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)


def _plain_zero_points(pieces: Pieces, scheme: Scheme, rows: int, groups: int) -> Callable[[], Bytes] | None:
    if scheme.symmetric and not pieces.has("weight_zero_point"):
        return None
    tensor = pieces.take_one_of("weight_zero_point", ("i8",), _shapes(scheme, rows, groups))

    def zero_points() -> Bytes:
        points = _unsigned(tensor, scheme.bits).reshape(-1, groups)
        return np.ascontiguousarray(np.broadcast_to(points, (rows, groups)))

    return zero_points


def _unsigned(tensor: Tensor, bits: int) -> Bytes:
    """Signed bytes with 2 ** (bits - 1) added: uint8, flat.

    Raises:
        FormatError: a value does not fit the bits.
    """
    half = 1 << (bits - 1)
    codes = np.ascontiguousarray(tensor.data).view(np.int8)
    if codes.size and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise FormatError(f"{tensor.name}: holds {codes.min()} .. {codes.max()}, which is not {bits} bits")
    unsigned: Bytes = codes.view(np.uint8) + np.uint8(half)
    return unsigned


def _weight(
    pieces: Pieces,
    scheme: Scheme,
    shape: tuple[int, int],
    scales: Tensor,
    *,
    size: int,
    zero_points: Callable[[], Bytes] | None,
    codes: Callable[[], Bytes],
) -> Tensor:
    rows, groups = shape[0], shape[1] // size
    form = AffineFormat(scheme.bits, size, scales.encoding.name, False)
    points = None if zero_points is None or symmetric(zero_points(), form) else zero_points

    def parts() -> AffineParts:
        stored = scales.data.reshape(-1, groups, form.scale_bytes)
        stored = np.broadcast_to(stored, (rows, groups, form.scale_bytes))
        return AffineParts(codes(), stored, None if points is None else points())

    return affine_weight(pieces.module, shape, replace(form, has_zero_point=points is not None), parts)


# -- writing -----------------------------------------------------------------------------------------


def pack_compressed_tensors(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Pieces in format pack-quantized, and ``quantization_config``: one group a kind of weight.

    Raises:
        UnsupportedError: the packing cannot hold a tensor; the message names it and says why.
    """
    method = "compressed-tensors"
    linears = quantized_linears(checkpoint, method)
    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for linear in linears.values():
        if linear.permutation is not None:
            raise linear.refuse(method, "has no order of columns of its own any more (act-order)")
        size = 0 if linear.groups == 1 else linear.form.group_size
        kinds.setdefault((linear.form.bits, size, not linear.form.has_zero_point), []).append(linear.module)
    groups = {
        f"group_{index}": {
            "targets": _targets(linears, modules, alone=len(kinds) == 1),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": is_symmetric,
                "strategy": "group" if size else "channel",
                "group_size": size or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for index, ((bits, size, is_symmetric), modules) in enumerate(kinds.items())
    }
    config: dict[str, object] = {
        "quant_method": method,
        "format": PACKED[0],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain_linears(checkpoint, linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return written(checkpoint, linears, _write_packed), config


def _targets(linears: Mapping[str, QuantizedLinear], modules: list[str], *, alone: bool) -> list[str]:
    if not alone:
        return modules
    return ["Linear", "Embedding"] if EMBEDDING in linears else ["Linear"]


def _write_packed(linear: QuantizedLinear, parts: Callable[[], AffineParts]) -> Iterator[Tensor]:
    bits, rows, columns, groups = linear.form.bits, linear.rows, linear.columns, linear.groups

    def weight_packed() -> Bytes:
        return flat(pack_rows(parts().codes, bits))

    def weight_scale() -> Bytes:
        return flat(parts().scales)

    def weight_zero_point() -> Bytes:
        points = parts().zero_points
        assert points is not None
        if int(points.max()) >= 2**bits:
            raise linear.refuse(
                "compressed-tensors", f"has zero points of {bits} bits; one here is {int(points.max())}"
            )
        return flat(pack_rows(np.ascontiguousarray(points.T), bits).T)

    i32, scale = encoding("i32"), encoding(linear.form.scale)
    module = linear.module
    yield Tensor(f"{module}.weight_packed", (rows, words_for(columns, bits)), i32, weight_packed)
    yield Tensor(f"{module}.weight_scale", (rows, groups), scale, weight_scale)
    if linear.form.has_zero_point:
        yield Tensor(f"{module}.weight_zero_point", (words_for(rows, bits), groups), i32, weight_zero_point)
    shape = np.array([rows, columns], "<i8")
    yield Tensor(f"{module}.weight_shape", (2,), encoding("i64"), flat(shape))
