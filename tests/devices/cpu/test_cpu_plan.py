"""Native plans are checked before they run: the kernels check nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nybble import _core

NONE, OUTPUT = _core.NONE, _core.OUTPUT
NOTHING = (NONE, 0)
NO_NORM = (NONE, 0.0, 0.0)
WIDTH, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 32, 10, 4, 2, 8


class Small:
    """A one-layer model by hand; ``change`` names one argument of one operator to replace."""

    def __init__(self, **change: Any) -> None:
        self.change = change
        plan = self.plan = _core.Plan()
        plan.vocab_size = self("vocab_size", VOCABULARY)
        plan.context_length = self("context_length", 64)
        random = np.random.default_rng(0)
        self.data = [
            random.standard_normal((rows, WIDTH)).astype(np.float32) for rows in (VOCABULARY, 64, WIDTH)
        ]
        table, qkv, square = (
            plan.add_weight("f32", len(values), WIDTH, values.reshape(-1).view(np.uint8))
            for values in self.data
        )
        norm = (plan.add_vector(np.ones(WIDTH, np.float32)), 1e-6, 0.0)
        short = plan.add_vector(np.ones(3, np.float32))
        x, projected, attended = (
            plan.add_buffer(WIDTH, False),
            plan.add_buffer(64, False),
            plan.add_buffer(WIDTH, False),
        )
        chosen, mixed = plan.add_buffer(WIDTH, True), plan.add_buffer(WIDTH, True)
        frequencies = np.ones(self("frequencies", 4), np.float32)
        rope = plan.add_rope(self("rotary_dim", 8), False, frequencies, 1.0, frequencies, 1.0)
        group = plan.add_kv_group(self("group_window", 0), 1, KV_HEADS, HEAD_DIM)
        self.names = {"short": short, "x": x, "projected": projected, "chosen": chosen, "norm": norm}
        plan.embedding(self("table", table), 1.0, self("embedding_out", (x, 0)))
        plan.norm(
            self("norm", norm),
            (x, 0),
            self("norm_out", (x, 0)),
            self("norm_width", WIDTH),
            self("norm_group", WIDTH),
            False,
        )
        plan.linear(
            self("linear_in", (x, 0)),
            self("linear_columns", WIDTH),
            self("linear_norm", NO_NORM),
            self("gated", False),
            "silu",
            self(
                "parts",
                [
                    (
                        self("weight", qkv),
                        self("row", 0),
                        self("rows", 64),
                        self("linear_out", (projected, 0)),
                        self("bias", NONE),
                        self("residual", NOTHING),
                    )
                ],
            ),
            self("linear_selected", False),
        )
        plan.attention(
            self("q", (projected, 0)),
            self("k", (projected, 32)),
            self("v", (projected, 48)),
            self("out", (attended, 0)),
            self("heads", HEADS),
            self("kv_heads", KV_HEADS),
            self("head_dim", HEAD_DIM),
            self("group", group),
            self("layer", 0),
            self("window", 0),
            1.0,
            0.0,
            self("q_norm", NO_NORM),
            NO_NORM,
            self("rope", rope),
        )
        plan.select(
            self("select_in", (attended, 0)), self("select_out", (chosen, 0)), self("select_width", WIDTH)
        )
        plan.linear(
            (chosen, 0), WIDTH, NO_NORM, False, "silu", [(square, 0, WIDTH, (mixed, 0), NONE, NOTHING)], True
        )
        plan.add(
            (mixed, 0),
            self("add_b", (chosen, 0)),
            (mixed, 0),
            self("add_width", WIDTH),
            self("add_selected", True),
        )
        plan.linear(
            (mixed, 0),
            WIDTH,
            NO_NORM,
            False,
            "silu",
            [(table, 0, VOCABULARY, (OUTPUT, 0), NONE, NOTHING)],
            True,
        )
        plan.scale((OUTPUT, 0), self("scale_out", (OUTPUT, 0)), VOCABULARY, 0.5, self("scale_selected", True))

    def __call__(self, name: str, value: Any) -> Any:
        found = self.change.get(name, value)
        return found(self.names) if callable(found) else found


def test_the_plan_as_it_is_runs() -> None:
    small = Small()
    small.plan.validate()
    session = _core.make_session(small.plan, 2, "f32", 0, 4, True)
    sequence, output = session.new_sequence(), np.full((1, VOCABULARY), np.nan, np.float32)
    session.forward([(sequence, np.arange(9, dtype=np.int32), 1, 0)], output)
    assert np.isfinite(output).all() and sequence.length == 9


At = Callable[[dict[str, Any]], Any]
NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"vocab_size": 0}, "vocabulary"),
    "no context": ({"context_length": 0}, "context length"),
    "vocabulary larger than the embedding": ({"vocab_size": 11}, "fewer rows than the vocabulary"),
    "unknown weight": ({"weight": 3}, "unknown weight"),
    "negative weight": ({"table": -1}, "unknown weight"),
    "unknown buffer": ({"linear_in": (9, 0)}, "linear input"),
    "buffer below zero": ({"embedding_out": (-7, 0)}, "embedding output"),
    "beyond a buffer's columns": ({"linear_out": lambda n: (n["projected"], 1)}, "linear output"),
    "negative column": ({"k": lambda n: (n["projected"], -1)}, "operator 3: k"),
    "column that overflows": ({"v": lambda n: (n["projected"], 2**63 - 1)}, "operator 3: v"),
    "norm of no groups": ({"norm_group": 0}, "norm group"),
    "norm of uneven groups": ({"norm_group": 5}, "norm group"),
    "short norm weight": ({"norm": lambda n: (n["short"], 0.0, 0.0)}, "norm weight"),
    "unknown norm weight": ({"linear_norm": (7, 0.0, 0.0)}, "linear norm weight"),
    "short query norm": ({"q_norm": lambda n: (n["short"], 0.0, 0.0)}, "query or key norm"),
    "norm too wide": ({"norm_width": 64, "norm_group": 32}, "norm input"),
    "wrong columns": ({"linear_columns": 16}, "linear columns"),
    "too many rows": ({"rows": 65}, "linear rows"),
    "rows that overflow": ({"row": 2**63 - 1}, "linear rows"),
    "negative row": ({"row": -1}, "linear rows"),
    "no rows": ({"rows": 0}, "linear rows"),
    "no parts": ({"parts": []}, "linear without parts"),
    "gate without up": ({"gated": True}, "gated parts"),
    "linear in place": ({"linear_in": lambda n: (n["projected"], 0)}, "linear output in the input's buffer"),
    "short bias": ({"bias": lambda n: n["short"]}, "linear bias"),
    "unknown residual": ({"residual": (8, 0)}, "linear residual"),
    "residual that is too narrow": ({"residual": lambda n: (n["x"], 0)}, "linear residual"),
    "residual shifted over the output": (
        {"rows": 32, "residual": lambda n: (n["projected"], 8)},
        "linear residual overlaps the output",
    ),
    "odd rotary": ({"rotary_dim": 7, "frequencies": 3}, "rotary_dim"),
    "rotary larger than the head": ({"rotary_dim": 10, "frequencies": 5}, "rotary_dim"),
    "missing frequencies": ({"frequencies": 3}, "rotary frequencies"),
    "unknown rotary": ({"rope": 1}, "rope"),
    "heads that do not divide": ({"kv_heads": 3}, "heads"),
    "no head_dim": ({"head_dim": 0}, "heads"),
    "heads that overflow": ({"heads": 2**62, "kv_heads": 2}, "heads"),
    "unknown KV group": ({"group": 1}, "KV group"),
    "negative KV group": ({"group": -1}, "KV group"),
    "layer of another group": ({"layer": 1}, "KV group shape"),
    "window of another group": ({"window": 5}, "KV group shape"),
    "negative window": ({"group_window": -1, "window": -1}, "KV group"),
    "attention over its keys": ({"out": lambda n: (n["projected"], 8)}, "attention output overlaps"),
    "queries over keys": ({"k": lambda n: (n["projected"], 16)}, "q overlaps k"),
    "select in place": (
        {"select_out": lambda n: (n["chosen"], 0), "select_in": lambda n: (n["chosen"], 0)},
        "select",
    ),
    "select too wide": ({"select_width": 33}, "select input"),
    "add too wide": ({"add_width": 33}, "elementwise input"),
    "all rows into the logits": ({"scale_selected": False}, "all rows in a place of selected rows"),
    "all rows of a selected buffer": ({"add_selected": False}, "all rows in a place of selected rows"),
    "embedding into the logits": ({"embedding_out": (OUTPUT, 0)}, "all rows in a place of selected rows"),
    "all rows from a selected buffer": (
        {"linear_in": lambda n: (n["chosen"], 0)},
        "all rows in a place of selected rows",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused(case: str) -> None:
    change, message = NONSENSE[case]
    small = Small(**change)
    with pytest.raises(ValueError, match=message):
        small.plan.validate()
    with pytest.raises(ValueError, match=message):
        _core.make_session(small.plan, 1, "f32", 0, 0, False)


def test_weights_are_checked_when_they_are_added() -> None:
    plan, data = _core.Plan(), np.zeros(64, np.uint8)
    for encoding, rows, columns, message in (
        ("q9_9", 1, 16, "no CPU kernel knows the encoding q9_9"),
        ("f32", 2, 16, "64 bytes instead of 64 x 2"),
        ("f32", 0, 16, "whole blocks"),
        ("f32", -1, 16, "whole blocks"),
        ("q4_0", 1, 16, "whole blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.add_weight(encoding, rows, columns, data)


def test_forward_checks_what_it_is_given() -> None:
    small = Small()
    session = _core.make_session(small.plan, 1, "f32", 0, 0, True)
    sequence, ids = session.new_sequence(), np.array([1, 2], np.int32)
    row = np.empty((1, VOCABULARY), np.float32)
    for items, output, message in (
        ([(sequence, ids, 1, 2)], row, "out of range"),
        ([(sequence, ids, 3, 0)], row, "out of range"),
        ([(sequence, ids, 2, 0)], row, "wrong shape"),
        ([(sequence, ids, 1, 0)], row[:, :-1].copy(), "wrong shape"),
        ([(sequence, ids, 1, 0), (sequence, ids, 0, 0)], row, "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            session.forward(items, output)
    with pytest.raises(IndexError, match="token id 10 is outside the vocabulary of 10"):
        session.forward([(sequence, np.array([1, 10], np.int32), 1, 0)], row)
    assert sequence.length == 0
