"""The rotary embedding of each layer: its tables are collected, compared and recovered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from nybble.checkpoint.config import RopeConfig
from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise.fused import Tables
from nybble.formats.onnx.recognise.layout import Pairs, heads_of
from nybble.formats.onnx.recognise.probe import RUN_INSTEAD, Probe
from nybble.formats.onnx.recognise.rope import (
    SAMPLED,
    SAMPLED_FAR,
    Rows,
    fits,
    recover,
    recover_longrope,
    rows_of,
)
from nybble.formats.onnx.recognise.structure import Block
from nybble.formats.onnx.recognise.values import Array, Known, View, Weight

FAR = 1 << 20
"""A length above every switch."""


class Runs(Protocol):
    """Made-up runs of one graph."""

    def __call__(self, past: int) -> Probe:
        """A run with that many cached tokens."""

    def jump(self, length: int) -> Probe | None:
        """The first run, but the last token's position is length - 1; None where positions are no input."""

    def still(self, past: int) -> Probe | None:
        """A longer cache with the first run's positions; None where positions are no input."""


@dataclass(frozen=True)
class Rotation:
    """One layer's tables: stored ones, or cos and sin of the made-up tokens."""

    cos: Array
    sin: Array
    first: int
    """Position of row 0."""
    interleaved: bool
    tables: Tables | None
    layer: int
    query: str
    """Name of the rotated q, where the rotation is spelled out."""
    sources: tuple[str, ...]

    @property
    def is_stored(self) -> bool:
        """Whether the rows of all positions are at hand."""
        return self.tables is not None and not self.tables.per_token

    def same(self, other: Rotation) -> bool:
        """Whether two layers rotate alike."""
        return (
            self.first == other.first
            and self.interleaved == other.interleaved
            and (self.cos is other.cos or np.array_equal(self.cos, other.cos))
            and (self.sin is other.sin or np.array_equal(self.sin, other.sin))
        )


def rotation_of(block: Block, layer: int, past: int) -> Rotation | None:
    """How a layer rotates q and k; None where it does not.

    Raises:
        UnsupportedError: q and k are rotated differently, or the tables are not plain.
    """
    values = block.attention.values
    q, k = (
        _one(term.values["tables"] if term is not None else None, pairs, past, layer, values["query"])
        for term, pairs in zip(block.rotary, (values["query_pairs"], values["key_pairs"]), strict=True)
    )
    if q is None and k is None:
        return None
    if q is None or k is None or not q.same(k):
        raise UnsupportedError(f"node {block.attention.node}: q and k are rotated differently; {RUN_INSTEAD}")
    for term in block.rotary:
        if term is not None and term.values["head_dim"] != values["head_dim"]:
            raise UnsupportedError(f"node {term.node}: heads of {term.values['head_dim']}; {RUN_INSTEAD}")
    return q


def _one(tables: Tables | None, pairs: Pairs | None, past: int, layer: int, query: str) -> Rotation | None:
    if tables is not None and pairs is not None:
        raise UnsupportedError(f"features are rotated twice; {RUN_INSTEAD}")
    if tables is not None:
        first, names = -tables.offset, tables.names
        return Rotation(tables.cos, tables.sin, first, tables.interleaved, tables, layer, "", names)
    if pairs is not None:
        return Rotation(pairs.cos, pairs.sin, past, pairs.interleaved, None, layer, query, pairs.sources)
    return None


def recovered(rotation: Rotation, runs: Runs, maximum: int, hints: Sequence[RopeConfig]) -> RopeConfig:
    """The config of a rotation; LongRoPE where the tables change with the sequence's length.

    Raises:
        UnsupportedError: tables that are no rotary embedding.
    """
    if rotation.is_stored:
        rope = _stored(rotation, runs, maximum, hints)
    else:
        rope = _computed(rotation, runs, maximum, hints)
    return replace(rope, interleaved=rotation.interleaved)


def _stored(rotation: Rotation, runs: Runs, maximum: int, hints: Sequence[RopeConfig]) -> RopeConfig:
    tables = rotation.tables
    assert tables is not None
    short = _at(tables, runs(1))

    def changed(past: int) -> bool:
        return not _alike(_at(tables, runs(past)), short)

    far = _again(rotation, tables, runs(FAR))
    if not changed(FAR):
        return recover(_rows(far, len(far.cos)), hints)
    past = _last(1, FAR, changed)
    original = runs(past).total
    if not _alike(_at(tables, runs(past + 1)), _at(tables, runs(FAR))):
        raise UnsupportedError(f"rotary tables that change with every length; {RUN_INSTEAD}")
    # Graphs may cut their tables to the sequence's length: the longest one shows most.
    near = _again(rotation, tables, runs(past))
    rows = _rows(near, min(original, len(near.cos))), _rows(far, len(far.cos))
    return recover_longrope(*rows, original, max(maximum, original), hints)


def _computed(rotation: Rotation, runs: Runs, maximum: int, hints: Sequence[RopeConfig]) -> RopeConfig:
    """From cos and sin that the graph computes for its tokens."""
    usual = recover(_rows(rotation, len(rotation.cos)), hints)
    still, jump = runs.still(FAR), runs.jump(FAR)
    if still is None or jump is None:
        # Positions come from the cache's length: rows far away must be those of the same frequencies.
        if rotation.layer == 0 or rotation.tables is not None:
            past = max(4096, min(maximum, 1 << 17))
            cos, sin = _rows_of_tokens(rotation, runs(past))
            first = runs(past).past
            if not fits(usual, rows_of(cos, sin, first, range(max(first, 1), first + len(cos))), 1):
                raise UnsupportedError(f"a rotary embedding that changes with the length; {RUN_INSTEAD}")
        return usual
    base = runs(1)
    for name in rotation.sources:
        if not np.array_equal(_array(name, still), _array(name, base)):
            raise UnsupportedError(f"a rotary embedding that changes with the cache's length; {RUN_INSTEAD}")
    count = len(rotation.cos) - 1  # the last token is the one that jumps

    def rows_at(length: int) -> tuple[Array, Array]:
        probe = runs.jump(length)
        assert probe is not None
        cos, sin = _rows_of_tokens(rotation, probe)
        return cos[:count], sin[:count]

    start = rotation.cos[:count], rotation.sin[:count]

    def changed(length: int) -> bool:
        return not all(np.array_equal(a, b) for a, b in zip(rows_at(length), start, strict=True))

    if not changed(FAR):
        return usual
    original = _last(base.total, FAR, changed)
    long, longest = rows_at(original + 1), rows_at(FAR)
    if not all(np.array_equal(a, b) for a, b in zip(long, longest, strict=True)):
        raise UnsupportedError(f"a rotary embedding that changes with every length; {RUN_INSTEAD}")
    positions = range(rotation.first, rotation.first + count)
    rows = rows_of(*start, rotation.first, positions), rows_of(*long, rotation.first, positions)
    return recover_longrope(*rows, original, max(maximum, original), hints)


def _rows_of_tokens(rotation: Rotation, probe: Probe) -> tuple[Array, Array]:
    """cos and sin of a run's tokens."""
    if rotation.tables is not None:
        cos, sin = (_array(name, probe) for name in rotation.tables.names)
        return (cos[0], sin[0]) if cos.ndim == 3 else (cos, sin)
    q = probe.get(rotation.query)
    pairs = heads_of(q, probe.tokens).pairs if isinstance(q, View) else None
    if pairs is None:
        raise UnsupportedError(f"a rotary embedding that is not always there; {RUN_INSTEAD}")
    return pairs.cos, pairs.sin


def _last(low: int, high: int, changed: Callable[[int], bool]) -> int:
    """The largest number from ``low`` on that changes nothing; ``high`` does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changed(middle) else (middle, high)
    return low


def _again(rotation: Rotation, tables: Tables, probe: Probe) -> Rotation:
    """The same tables as another run sees them."""
    cos, sin, offset = _at(tables, probe)
    return replace(rotation, cos=cos, sin=sin, first=-offset)


def _rows(rotation: Rotation, count: int) -> Rows:
    last = rotation.first + count - 1
    wanted = [p for p in (*SAMPLED, *SAMPLED_FAR) if p <= last]
    if last > 0 and last not in wanted and rotation.tables is not None:
        wanted.append(last)
    return rows_of(rotation.cos, rotation.sin, rotation.first, wanted)


def _array(name: str, probe: Probe) -> Array:
    value = probe.get(name)
    if isinstance(value, Known):
        return value.array
    if isinstance(value, Weight):
        return probe.stored_array(value)
    raise UnsupportedError(f"the rotary table {name!r} depends on activations; {RUN_INSTEAD}")


def _at(tables: Tables, probe: Probe) -> tuple[Array, Array, int]:
    """cos, sin and offset of a run."""
    cos, sin = (_array(name, probe) for name in tables.names)
    offset = 0
    if tables.positions:
        offset = int(_array(tables.positions, probe).reshape(-1)[0]) - probe.past
    return cos, sin, offset


def _alike(one: tuple[Array, Array, int], other: tuple[Array, Array, int]) -> bool:
    """Whether two runs see the same tables, as far as both go."""
    return one[2] == other[2] and all(
        a is b or np.array_equal(a[: min(len(a), len(b))], b[: min(len(a), len(b))])
        for a, b in zip(one[:2], other[:2], strict=True)
    )
