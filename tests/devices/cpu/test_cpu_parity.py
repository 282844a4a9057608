"""The CPU device against the reference device: every family, every way to cut the work, odd shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.config import ModelConfig
from nybble.devices import cpu, reference
from nybble.devices.base import BatchItem, Session
from support.random_checkpoints import (
    FAMILIES,
    LLAMA,
    VOCABULARY,
    Floats,
    largest_difference,
    random_checkpoint,
    relative_error,
    rope,
    run,
    tokens,
)

EXACT = 1e-4
"""Largest difference of logits with float32 everywhere, relative to the largest logit."""


def fast_bound(config: ModelConfig) -> float:
    """Largest relative RMS error of logits that rounding in precision ``fast`` explains.

    int8 blocks of 32: the largest of 32 normal values is about 2.2 deviations, so a step is
    2.2 / 127 and the error of an activation step / sqrt(12), 0.5 % of a deviation. bfloat16 on both
    sides is less: 2 ** -9 / sqrt(3) each, 0.16 % together. Errors of the linears are independent
    and each passes its relative error on, so they add up as squares. Norms, softmax and gates enlarge
    what reaches them: softmax most, where a window leaves a random model few keys of very different
    scores. The largest seen over all families and levels is 2.3 times; 3 are allowed.
    """
    linears = 4 * config.num_hidden_layers + 1
    return float(3 * 0.005 * linears**0.5)


CUTS = {
    "whole": [],
    "chunks": [30, 1, 17, 3],
    "one by one": [1] * 90,
    "prompt, then one by one": [70, *[1] * 20],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_are_those_of_the_reference(family: str) -> None:
    checkpoint, ids = random_checkpoint(FAMILIES[family]), tokens(90)
    plain = reference.compile_session(checkpoint)
    session = cpu.compile_session(checkpoint, precision="f32", threads=2, max_rows=64)
    for name, sizes in CUTS.items():
        assert largest_difference(run(session, ids, sizes), run(plain, ids, sizes)) < EXACT, name


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_logits_differ_by_rounding_only(family: str) -> None:
    config = FAMILIES[family]
    ids, cuts = tokens(90), [[], [30, 1, 17, 3], [1] * 90]
    blocks = config.num_attention_heads * config.head_dim % 32 == 0
    for weights in ("f32", "q8_0") if blocks else ("f32",):
        checkpoint = random_checkpoint(config, weights=weights)
        plain = reference.compile_session(checkpoint)
        session = cpu.compile_session(checkpoint, threads=2, max_rows=64)
        for sizes in cuts:
            error = relative_error(run(session, ids, sizes), run(plain, ids, sizes))
            assert error < fast_bound(config), (weights, len(sizes))


def ragged(session: Session, steps: int = 6) -> list[Floats]:
    """Five sequences at once: prefills, decodes and idle ones mixed, all kinds of rows asked for."""
    ids = [tokens(120, seed) for seed in range(5)]
    sequences = [session.new_sequence() for _ in ids]
    counts = [
        [40, 1, 1, 1, 7, 1],
        [1, 3, 1, 20, 1, 1],
        [0, 50, 1, 0, 1, 30],
        [2, 2, 2, 2, 2, 2],
        [0, 0, 1, 1, 65, 1],
    ]
    kinds = ["last", "all", "none", "all", "last"]
    results = []
    for step in range(steps):
        batch = []
        for sequence, own, count, kind in zip(sequences, ids, counts, kinds, strict=True):
            new = own[sequence.length : sequence.length + count[step]]
            if new:
                batch.append(BatchItem(sequence, new, "all" if kind == "none" and step == 5 else kind))
        results.append(session.forward(batch))
    return results


@pytest.mark.parametrize("family", ["llama", "phi3-longrope-window", "gemma2", "gemma3"])
def test_ragged_batches(family: str) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    expected = ragged(reference.compile_session(checkpoint))
    for max_rows in (64, 7):
        session = cpu.compile_session(checkpoint, precision="f32", threads=2, max_rows=max_rows)
        for actual, plain in zip(ragged(session), expected, strict=True):
            assert largest_difference(actual, plain) < EXACT
    session = cpu.compile_session(checkpoint, threads=2)
    for actual, plain in zip(ragged(session), expected, strict=True):
        assert relative_error(actual, plain) < fast_bound(checkpoint.config)


def test_rows_asked_for() -> None:
    session = cpu.compile_session(random_checkpoint(LLAMA), threads=2, max_rows=64)
    ids = tokens(150)  # more than max_rows: the last row is in the third round
    for kind, rows in (("none", 0), ("last", 1), ("all", 150)):
        logits = session.forward([BatchItem(session.new_sequence(), ids, kind)])
        assert logits.shape == (rows, VOCABULARY)
        assert logits.dtype == np.float32
    assert session.forward([]).shape == (0, VOCABULARY)
    sequence = session.new_sequence()
    assert session.forward([BatchItem(sequence, [], "all")]).shape == (0, VOCABULARY)
    assert sequence.length == 0


SHAPES: dict[str, dict[str, object]] = {
    **{f"head_dim {d}": {"head_dim": d, "rope": rope(d)} for d in (2, 6, 20, 64, 80, 96, 128, 256)},
    "part of a head rotated": {"head_dim": 80, "rope": rope(80, rotary_dim=34)},
    "interleaved, part of a head": {"head_dim": 40, "rope": rope(40, rotary_dim=30, interleaved=True)},
    "one key-value head": {"num_attention_heads": 7, "num_key_value_heads": 1},
    "many heads a key": {"num_attention_heads": 40, "num_key_value_heads": 1, "head_dim": 8, "rope": rope(8)},
    "as many keys as queries": {"num_attention_heads": 5, "num_key_value_heads": 5},
    "hidden size 80, not of 32": {"hidden_size": 80, "intermediate_size": 112},
    "hidden size 36, not of 16": {"hidden_size": 36, "intermediate_size": 51},
    "wide MLP": {"intermediate_size": 1376},
    "hidden size 1312": {"hidden_size": 1312, "num_hidden_layers": 1},
    "vocabulary of 1": {"vocab_size": 1},
    "vocabulary of 4099": {"vocab_size": 4099, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_shapes(shape: str, architecture: str) -> None:
    config = replace(LLAMA, architecture=architecture, **{"num_hidden_layers": 2, **SHAPES[shape]})
    checkpoint = random_checkpoint(config)
    ids = [token % config.vocab_size for token in tokens(40)]
    sizes = [33, 1, 2]
    expected = run(reference.compile_session(checkpoint), ids, sizes)
    exact = cpu.compile_session(checkpoint, precision="f32", threads=2)
    assert largest_difference(run(exact, ids, sizes), expected) < EXACT
    fast = cpu.compile_session(checkpoint, threads=2)
    assert relative_error(run(fast, ids, sizes), expected) < fast_bound(config)


def test_long_sequences_cut_the_keys_among_threads() -> None:
    """Beyond 512 keys a decoded token's attention is computed in parts that are put together."""
    config = replace(LLAMA, max_position_embeddings=2048, num_hidden_layers=1)
    checkpoint, ids = random_checkpoint(config), tokens(1300)
    sizes = [511, 1, 1, 1, 600, 1, 1]
    expected = run(reference.compile_session(checkpoint), ids, sizes)
    session = cpu.compile_session(checkpoint, precision="f32", threads=3)
    assert largest_difference(run(session, ids, sizes), expected) < EXACT


def test_gguf_order_of_rows_changes_nothing() -> None:
    """Rotating neighbours and rotating halves are the same but for the order of q and k rows."""
    config = replace(LLAMA, head_dim=32, rope=rope(32))
    checkpoint = random_checkpoint(config)
    other = replace(checkpoint, config=replace(config, rope=rope(32, interleaved=True)))
    ids = tokens(30)
    one, two = (run(cpu.compile_session(c, precision="f32"), ids) for c in (checkpoint, other))
    assert largest_difference(one, two) > 1e-3
