"""Reading index arrays: which part of a token's features a view holds, and in which order of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise.values import Array, Term, View


def features_of(view: View) -> Term:
    """The term whose rows are the view's tokens and whose columns are its last axis.

    A whole term, a column range of it, some of its rows, or one of these times a number.

    Raises:
        UnsupportedError: the elements lie in another order.
    """
    return _unscaled(view).scaled(view.gain)


def _unscaled(view: View) -> Term:
    base = view.base
    if view.is_whole:
        return base
    if len(view.parts) != 1 or view.parts[0][1] is not None:
        raise UnsupportedError(f"sums of elements of {base.node} stand where plain features are needed")
    width, index = view.shape[-1], view.parts[0][0].reshape(-1, view.shape[-1])
    first = index[:, 0]
    begin, rows = int(first[0] % base.width), first // base.width
    if (index != first[:, None] + np.arange(width)).any() or (first % base.width != begin).any():
        raise UnsupportedError(f"elements of {base.node} stand in an order that is not understood")
    if begin + width > base.width:
        raise UnsupportedError(f"elements of {base.node} stand in an order that is not understood")
    found = base.slice(begin, begin + width)
    tokens = math.prod(base.shape[:-1])
    if len(rows) == tokens and (rows == np.arange(tokens)).all():
        return found
    if len(rows) == 1 and rows[0] == tokens - 1:
        return found.made.setdefault("last", Term("select_rows", (found,), (1, 1, width), base.node))
    raise UnsupportedError(f"some rows of {base.node} are left out or moved")


def order_of_features(view: View) -> Array | None:
    """The order of a whole term's features, int64 (width), where a view permutes them; else None."""
    base, width = view.base, view.shape[-1]
    if view.is_whole or width != base.width or len(view.parts) != 1 or view.parts[0][1] is not None:
        return None
    index = view.parts[0][0].reshape(-1, width)
    order = index[0]
    if len(index) != math.prod(base.shape[:-1]) or (np.sort(order) != np.arange(width)).any():
        return None
    if (index != order + np.arange(len(index))[:, None] * width).any():
        return None
    return np.asarray(order)


@dataclass(frozen=True)
class Pairs:
    """cos and sin that multiply each pair of features, by token, as an export computes them."""

    cos: Array
    """(tokens, rotary_dim / 2)."""
    sin: Array
    interleaved: bool
    sources: tuple[str, ...]
    """Names of the arrays that they come from."""


@dataclass(frozen=True)
class Heads:
    """Features by heads: ``term`` is (1, tokens, heads * head_dim), before ``pairs`` turn it."""

    term: Term
    heads: int
    head_dim: int
    gain: float
    pairs: Pairs | None


def heads_of(view: View, tokens: int, *, shared: bool = False) -> Heads:
    """What a view (1, heads, tokens, head_dim) holds.

    Heads may have two axes, and be repeated when ``shared``.

    Raises:
        UnsupportedError: the elements lie in another order.
    """
    *leading, length, head_dim = view.shape
    heads = math.prod(leading)
    base = view.base
    strange = UnsupportedError(f"heads of {base.node} lie in an order that is not understood")
    if length != tokens or base.shape[1:2] != (tokens,) or len(base.shape) != 3:
        raise strange
    grid = (heads, tokens, head_dim)
    main = view.parts[0][0].reshape(grid)
    if len(view.parts) > 1:
        main = _own_part(view.parts, grid)
    starts = main[:, 0, 0]
    expected = starts[:, None, None] + np.arange(tokens)[:, None] * base.width + np.arange(head_dim)
    if (main != expected).any() or (starts >= base.width).any():
        raise strange
    count = heads
    if shared:
        count = len(np.unique(starts))
        if heads % count or (starts != np.repeat(starts[:: heads // count], heads // count)).any():
            raise strange
    order = starts[:: heads // count]
    begin = int(order[0])
    if (order != begin + head_dim * np.arange(count)).any() or begin + count * head_dim > base.width:
        raise strange
    pairs = None
    if len(view.parts) > 1 or view.parts[0][1] is not None:
        pairs = _pairs(view, main, grid)
    return Heads(base.slice(begin, begin + count * head_dim), count, head_dim, view.gain, pairs)


def _own_part(parts: list[Any], grid: tuple[int, int, int]) -> Array:
    """The part whose elements ascend by one along each head."""
    for index, _ in parts:
        array = index.reshape(grid)
        if (np.diff(array, axis=2) == 1).all():
            return np.asarray(array)
    # A partial rotary joined from pieces may hold both kinds; take the ascending element of each place.
    options = np.stack([index.reshape(grid) for index, _ in parts])
    start = options[:, :, :, :1].min(axis=0)
    return np.asarray(start + np.arange(grid[2]))


def _pairs(view: View, main: Array, grid: tuple[int, int, int]) -> Pairs:
    """cos and sin of a view that is its own elements times cos plus their partners times sin."""
    strange = UnsupportedError(f"the rotary embedding of {view.base.node} is not understood")
    cos = np.zeros(grid, np.float64)
    sin = np.zeros(grid, np.float64)
    offset = np.zeros(grid, np.int64)
    for index, factor in view.parts:
        move = index.reshape(grid) - main
        times = np.ones(grid) if factor is None else np.broadcast_to(factor, view.shape).reshape(grid)
        times = np.where(np.isfinite(times), times, 0.0)
        cos += np.where(move == 0, times, 0.0)
        away = (move != 0) & (times != 0)
        if (away & (offset != 0) & (offset != move)).any():
            raise strange
        offset = np.where(away, move, offset)
        sin += np.where(away, times, 0.0)
    if (cos != cos[0]).any() or (sin != sin[0]).any():
        raise strange
    turn, move = (sin[0] != 0).any(axis=0), np.abs(offset).max(axis=(0, 1))
    # sin(0) at position 0 hides nothing: the probe's first position is above 0.
    turned = np.flatnonzero(turn)
    if not len(turned):
        raise strange
    rotary_dim = int(turned[-1]) + 1
    if rotary_dim % 2 or not turn[:rotary_dim].all():
        raise strange
    interleaved = bool(rotary_dim > 2 and (move[:rotary_dim] == 1).all())
    half = rotary_dim // 2
    first = np.arange(0, rotary_dim, 2) if interleaved else np.arange(half)
    second = first + (1 if interleaved else half)
    distance = 1 if interleaved else half
    rest = cos[0][:, rotary_dim:]
    if (
        (move[:rotary_dim] != distance).any()
        or not np.allclose(cos[0][:, first], cos[0][:, second], rtol=1e-6)
        or not np.allclose(sin[0][:, first], -sin[0][:, second], rtol=1e-6)
        or not np.allclose(rest, 1.0)
    ):
        raise strange
    return Pairs(cos[0][:, first], sin[0][:, second], interleaved, tuple(dict.fromkeys(view.sources)))


def narrowed(view: View) -> View:
    """The same view, of the column range of its base that it looks at and no more."""
    if view.is_whole or len(view.parts) != 1 or view.parts[0][1] is not None or len(view.base.shape) != 3:
        return view
    rows, columns = np.divmod(view.parts[0][0], view.base.width)
    begin, end = int(columns.min()), int(columns.max()) + 1
    index = rows * (end - begin) + (columns - begin)
    return View(view.base.slice(begin, end), view.shape, lambda: [(index, None)], view.gain)


def head_rows(view: View) -> tuple[Array, int]:
    """For a view whose last axis is whole heads: index of each head's first element, and head_dim.

    Raises:
        UnsupportedError: the last axis is no run of neighbouring elements that is aligned.
    """
    strange = UnsupportedError(f"heads of {view.base.node} lie in an order that is not understood")
    if len(view.parts) != 1 or view.parts[0][1] is not None:
        raise strange
    index, head_dim = view.parts[0][0], view.shape[-1]
    first = index[..., :1]
    if view.base.width % head_dim or (first % head_dim).any() or (index != first + np.arange(head_dim)).any():
        raise strange
    return first, head_dim
