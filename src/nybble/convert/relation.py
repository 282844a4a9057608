"""How two encodings are related: exact, lossy or refused; and the way from one to the other.

============================  ===========  ============================================================
from, to                      relation     how
============================  ===========  ============================================================
any, itself                   exact        kept, not even decoded
f16 or bf16, f32              exact        widened
any block encoding, f32       exact        dequantized: its values are float32 by definition
any, f16 or bf16              by the data  rounded; exact where every value survives
integers with scales, others  by the data  transcoded: codes, scales and zero points moved as they are
the same, wider scales        lossy        scales (and minima) rounded: codes and zero points as they are
any, one with a quantizer     by the data  quantized: decoded and made anew, lossy in all but odd cases
indices, anything else        refused      they are no weights
any, one without a quantizer  refused
============================  ===========  ============================================================

Everything works on a few rows at a time, so that a tensor of any size needs no more than its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from nybble.checkpoint.encodings import Encoding, encoding
from nybble.checkpoint.encodings.affine import affine_format, join, split
from nybble.checkpoint.encodings.base import Bytes, Floats
from nybble.checkpoint.tensor import Tensor
from nybble.convert.errors import ValueErrors
from nybble.convert.threads import in_order
from nybble.convert.transcode import ggml_affine
from nybble.errors import ConversionError
from nybble.formats.mapping import release_pages

Quantize = Callable[[Floats], Bytes]
"""Flat float32 of whole rows as flat uint8 of whole blocks."""
Kind = Literal["exact", "lossy", "refused"]

PLAIN_FLOATS = ("f32", "f16", "bf16")
INTEGERS = ("i8", "i16", "i32", "i64")
CHUNK = 1 << 17
"""Elements that a thread works on at a time: they stay in its cache."""


@dataclass(frozen=True)
class Relation:
    """What becomes of values that go from one encoding to another."""

    kind: Kind
    how: str
    """For people: ``kept``, ``widened``, ``dequantized``, ``rounded``, ``transcoded``, ``scales rounded``,
    ``quantized``."""
    by_data: bool = False
    """Lossy in general, but the data may be such that nothing is lost."""
    reason: str = ""
    """Why it is refused, or what is lost."""


def relation(source: Encoding, target: Encoding, columns: int | None = None) -> Relation:
    """The relation of two encodings, whatever the data.

    ``columns``, the length of a row, is looked at where given: rows must be whole blocks.
    """
    if source.name == target.name:
        return Relation("exact", "kept")
    if source.name in INTEGERS or target.name in INTEGERS:
        return Relation("refused", "", reason="integers are indices and stay as they are")
    if columns is not None and columns % target.block_size:
        reason = f"rows of {columns} are no whole blocks of {target.block_size}"
        return Relation("refused", "", reason=reason)
    if target.name == "f32" and source.name != "f64":
        return Relation("exact", "widened" if source.block_size == 1 else "dequantized")
    way = ggml_affine.relation(source.name, target.name)
    if way is not None:
        return Relation("exact" if way == "exact" else "lossy", "transcoded", by_data=way != "exact")
    if target.quantize is None:
        return Relation("refused", "", reason=f"there is no quantizer for {target.name}")
    if target.block_size == 1:
        return Relation("lossy", "rounded", by_data=True)
    return Relation("lossy", "quantized", by_data=True)


def relation_of(tensor: Tensor, target: Encoding) -> Relation:
    """The relation for one tensor: reads its data where that decides, up to the first value lost."""
    general = relation(tensor.encoding, target, tensor.shape[-1] if tensor.shape else None)
    if not general.by_data:
        return general
    lost = _first_lost(tensor, target)
    if lost is None:
        return Relation("exact", general.how)
    if general.how == "transcoded" and _has_room(tensor, target):
        return Relation("lossy", "scales rounded", reason=lost)
    if target.quantize is None:
        return Relation("refused", "", reason=f"{lost}, and there is no quantizer for {target.name}")
    # Codes that do not fit as they are can be made anew from the values.
    return Relation("lossy", "quantized" if target.block_size > 1 else "rounded", reason=lost)


class Look(Protocol):
    """Sees the pieces of a tensor go by."""

    def see(self, part: Bytes, values: Floats) -> Any:
        """Makes something of the source's encoded bytes and their values; called in several threads."""
        ...

    def take(self, made: Any) -> None:
        """Gets what ``see`` returned, in the pieces' order."""
        ...


def recoded(
    tensor: Tensor,
    target: Encoding,
    *,
    how: str = "quantized",
    done: Callable[[ValueErrors], None] | None = None,
    look: Callable[[], Look | None] | None = None,
    quantize: Quantize | None = None,
) -> Tensor:
    """The tensor in another encoding, computed when its data is asked for.

    Args:
        tensor: where it comes from.
        target: an encoding to which the relation is not refused; its own: nothing is done.
        how: what ``relation_of`` said: ``transcoded`` and ``scales rounded`` move codes, everything else goes
            by the values.
        done: gets the differences of the values each time that the data was computed.
        look: called each time that the data is computed; what it returns, if anything, sees the pieces.
        quantize: makes the blocks of whole rows in place of the encoding's own rounding.

    The data raises ConversionError where a value does not fit in the target at all.
    """

    if tensor.encoding.name == target.name:
        return tensor

    def data() -> Bytes:
        looking = None if look is None else look()

        def work(part: Bytes) -> tuple[Bytes, ValueErrors, Any]:
            if how == "transcoded" and done is None:
                return _transcoded(tensor, part, target), ValueErrors(), None
            values = tensor.encoding.dequantize(part)
            if how == "transcoded":
                encoded = _transcoded(tensor, part, target)
            elif how == "scales rounded":
                encoded = _with_rounded_scales(tensor, part, target)
            else:
                encoded = _quantized(tensor, values, target, quantize)
            errors = ValueErrors()
            if done is not None:
                errors = ValueErrors.of(values, target.dequantize(encoded))
            return encoded, errors, None if looking is None else looking.see(part, values)

        out = np.empty(target.nbytes(math.prod(tensor.shape)), np.uint8)
        total = ValueErrors()
        position = 0
        for encoded, errors, made in in_order(work, _pieces(tensor)):
            out[position : position + encoded.size] = encoded
            position += encoded.size
            total = total + errors
            if looking is not None:
                looking.take(made)
        if done is not None:
            done(total)
        return out

    return tensor.changed(encoding=target, data=data)


# -- pieces --------------------------------------------------------------------------------------------


def _first_lost(tensor: Tensor, target: Encoding) -> str | None:
    """None where every value survives, else why one does not; ends at the first such rows."""
    try:
        return _lost(tensor, target)
    finally:
        release_pages()  # of what was read only to look at it


def _lost(tensor: Tensor, target: Encoding) -> str | None:
    moved = ggml_affine.relation(tensor.encoding.name, target.name) is not None
    for part in _pieces(tensor):
        if moved:
            found = ggml_affine.transcode(part, tensor.encoding.name, target.name, tensor.shape[-1])
            if isinstance(found, ggml_affine.Inexact):
                return found.reason
            continue
        if target.quantize is None:
            return "values would change"
        meant = tensor.encoding.dequantize(part)
        try:
            encoded = target.quantize(meant)
        except ValueError as error:
            return str(error)
        if not np.array_equal(meant, target.dequantize(encoded), equal_nan=True):
            return "values would change"
    return None


def _transcoded(tensor: Tensor, part: Bytes, target: Encoding) -> Bytes:
    moved = ggml_affine.transcode(part, tensor.encoding.name, target.name, tensor.shape[-1])
    if isinstance(moved, ggml_affine.Inexact):
        raise ConversionError(f"{tensor.name}: a block does not fit in {target.name}: {moved.reason}")
    return moved


def _with_float32_scales(target: Encoding) -> Encoding | None:
    """The same groups with wider scales; None where the scales are float32 already."""
    form = affine_format(target.name)
    if form is None or form.scale == "f32":
        return None
    return encoding(replace(form, scale="f32").name)


def _has_room(tensor: Tensor, target: Encoding) -> bool:
    """Whether codes and zero points fit, and nothing but the scales is too wide."""
    wide = _with_float32_scales(target)
    return wide is not None and (tensor.encoding.name == wide.name or _first_lost(tensor, wide) is None)


def _with_rounded_scales(tensor: Tensor, part: Bytes, target: Encoding) -> Bytes:
    wide, form = _with_float32_scales(target), affine_format(target.name)
    assert wide is not None and form is not None
    moved = part if tensor.encoding.name == wide.name else _transcoded(tensor, part, wide)
    parts = split(moved, tensor.shape[-1], replace(form, scale="f32"))
    narrow = encoding(form.scale)

    def rounded(numbers: Bytes) -> Bytes:
        assert narrow.quantize is not None
        wanted = numbers.reshape(-1).view("<f4")
        made = narrow.quantize(wanted)
        _check_range(tensor.name, wanted, narrow.dequantize(made), narrow)
        return made.reshape(*numbers.shape[:2], form.scale_bytes)

    minima = None if parts.minima is None else rounded(parts.minima)
    return join(replace(parts, scales=rounded(parts.scales), minima=minima), form)


def _quantized(tensor: Tensor, values: Floats, target: Encoding, quantize: Quantize | None = None) -> Bytes:
    chosen = quantize or target.quantize
    assert chosen is not None
    try:
        encoded = chosen(values)
    except ValueError as error:
        raise ConversionError(f"{tensor.name}: {error}") from error
    if target.block_size == 1:
        _check_range(tensor.name, values, target.dequantize(encoded), target)
    return encoded


def _check_range(name: str, values: Floats, rounded: Floats, target: Encoding) -> None:
    """A finite value that became infinite is no rounding error."""
    bad = np.isinf(rounded) & np.isfinite(values)
    if bad.any():
        value = float(values[int(bad.argmax())])
        raise ConversionError(
            f"{name}: the value {value:g} does not fit in {target.name}; bf16 and f32 hold it"
        )


def _pieces(tensor: Tensor) -> Iterator[Bytes]:
    """The encoded data, some rows at a time (of a vector: all of it)."""
    data = tensor.data
    columns = tensor.shape[-1] if tensor.shape else 1
    if not data.size:
        return
    rows = math.prod(tensor.shape) // columns
    row_bytes = data.size // rows
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield data[start * row_bytes : (start + step) * row_bytes]
