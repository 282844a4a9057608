"""The rotary embedding of each layer: its tables are collected, compared and recovered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nybble.checkpoint.config import RopeConfig
from nybble.errors import UnsupportedError
from nybble.formats.onnx.recognise.fused import Tables
from nybble.formats.onnx.recognise.layout import Pairs
from nybble.formats.onnx.recognise.probe import RUN_INSTEAD, Probe
from nybble.formats.onnx.recognise.rope import (
    SAMPLED,
    SAMPLED_FAR,
    Rows,
    recover,
    recover_longrope,
    rows_of,
)
from nybble.formats.onnx.recognise.structure import Block
from nybble.formats.onnx.recognise.values import Array, Known, Weight

FAR = 1 << 20
"""A length above every switch."""


@dataclass(frozen=True)
class Rotation:
    """One layer's tables: stored ones, or cos and sin of the made-up tokens."""

    cos: Array
    sin: Array
    first: int
    """Position of row 0."""
    interleaved: bool
    tables: Tables | None

    def same(self, other: Rotation) -> bool:
        """Whether two layers rotate alike."""
        return (
            self.first == other.first
            and self.interleaved == other.interleaved
            and (self.cos is other.cos or np.array_equal(self.cos, other.cos))
            and (self.sin is other.sin or np.array_equal(self.sin, other.sin))
        )


def rotation_of(block: Block, past: int) -> Rotation | None:
    """How a layer rotates q and k; None where it does not.

    Raises:
        UnsupportedError: q and k are rotated differently, or the tables are not plain.
    """
    values = block.attention.values
    found = [
        _one(term.values["tables"] if term is not None else None, pairs, past)
        for term, pairs in zip(block.rotary, (values["query_pairs"], values["key_pairs"]), strict=True)
    ]
    q, k = found
    if q is None and k is None:
        return None
    if q is None or k is None or not q.same(k):
        raise UnsupportedError(f"node {block.attention.node}: q and k are rotated differently; {RUN_INSTEAD}")
    for term in block.rotary:
        if term is not None and term.values["head_dim"] != values["head_dim"]:
            raise UnsupportedError(f"node {term.node}: heads of {term.values['head_dim']}; {RUN_INSTEAD}")
    return q


def _one(tables: Tables | None, pairs: Pairs | None, past: int) -> Rotation | None:
    if tables is not None and pairs is not None:
        raise UnsupportedError(f"features are rotated twice; {RUN_INSTEAD}")
    if tables is not None:
        return Rotation(tables.cos, tables.sin, -tables.offset, tables.interleaved, tables)
    if pairs is not None:
        return Rotation(pairs.cos, pairs.sin, past, pairs.interleaved, None)
    return None


def recovered(
    rotation: Rotation, probe_of: Callable[[int], Probe], maximum: int, hints: Sequence[RopeConfig]
) -> RopeConfig:
    """The config of a rotation; LongRoPE where the tables change with the sequence's length.

    ``probe_of(past)`` makes a run with that many cached tokens.

    Raises:
        UnsupportedError: tables that are no rotary embedding.
    """
    tables = rotation.tables
    if tables is None or tables.per_token:
        return replace(recover(_rows(rotation, len(rotation.cos)), hints), interleaved=rotation.interleaved)
    original = _switch(tables, probe_of)
    far = _again(rotation, tables, probe_of(FAR))
    if original is None:
        rope = recover(_rows(far, len(far.cos)), hints)
    else:
        # Graphs may cut their tables to the sequence's length: the longest one shows most.
        near = _again(rotation, tables, probe_of(max(1, original - probe_of(1).tokens)))
        short = _rows(near, min(original, len(near.cos)))
        rope = recover_longrope(short, _rows(far, len(far.cos)), original, max(maximum, original), hints)
    return replace(rope, interleaved=rotation.interleaved)


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


def _at(tables: Tables, probe: Probe) -> tuple[Array, Array, int]:
    """cos, sin and offset of a run."""
    arrays: list[Array] = []
    for name in tables.names:
        value = probe.get(name)
        if isinstance(value, Known):
            arrays.append(value.array)
        elif isinstance(value, Weight):
            arrays.append(probe.stored_array(value))
        else:
            raise UnsupportedError(f"the rotary table {name!r} depends on activations; {RUN_INSTEAD}")
    offset = 0
    if tables.positions:
        positions = probe.get(tables.positions)
        if not isinstance(positions, Known):
            raise UnsupportedError(f"the positions {tables.positions!r} are not known; {RUN_INSTEAD}")
        offset = int(positions.array.reshape(-1)[0]) - probe.past
    return arrays[0], arrays[1], offset


def _switch(tables: Tables, probe_of: Callable[[int], Probe]) -> int | None:
    """The longest sequence that uses the same rows as the shortest; None where all do."""
    short = _at(tables, probe_of(1))

    def changed(past: int) -> bool:
        found = _at(tables, probe_of(past))
        return found[2] != short[2] or not all(
            a is b or _starts_alike(a, b) for a, b in zip(found[:2], short[:2], strict=True)
        )

    if not changed(FAR):
        return None
    low, high = 1, FAR
    while high - low > 1:
        middle = (low + high) // 2
        if changed(middle):
            high = middle
        else:
            low = middle
    return probe_of(low).total


def _starts_alike(a: Array, b: Array) -> bool:
    rows = min(len(a), len(b))
    return np.array_equal(a[:rows], b[:rows])
