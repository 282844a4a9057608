"""The same logits to the last bit: whatever the number of threads, and alone or in a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble import _core
from nybble.checkpoint.config import ModelConfig
from nybble.devices import cpu
from nybble.devices.base import BatchItem
from nybble.devices.cpu.session import CpuSession
from support.random_checkpoints import FAMILIES, LLAMA, Floats, random_checkpoint, rope, run, tokens

CONFIG = replace(
    LLAMA, hidden_size=256, intermediate_size=544, num_attention_heads=8, head_dim=32, rope=rope(32),
    vocab_size=307, max_position_embeddings=1024,
)  # fmt: skip


@pytest.mark.parametrize("weights", ["f32", "q4_k-like", "q8_0", "q4_1"])
@pytest.mark.parametrize("precision", ["fast", "f32"])
def test_threads_change_nothing(weights: str, precision: str) -> None:
    config, ids = CONFIG, tokens(90)
    if weights == "q4_k-like":
        weights, config = "q4_k", replace(CONFIG, intermediate_size=512)
    checkpoint = random_checkpoint(config, weights=weights)
    sizes = [40, 5, 1, 1, 8, 1, 17]
    expected: Floats | None = None
    for threads in (1, 2, 3, 7):
        session = cpu.compile_session(checkpoint, threads=threads, precision=precision)
        assert session.threads == threads
        actual = run(session, ids, sizes)
        if expected is None:
            expected = actual
        np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(run(session, ids, sizes), expected)  # and again: no state is left


def test_threads_change_nothing_in_long_sequences() -> None:
    checkpoint, ids = random_checkpoint(replace(CONFIG, num_hidden_layers=1)), tokens(700)
    one, *others = (run(cpu.compile_session(checkpoint, threads=n), ids, [690, 1, 1]) for n in (1, 2, 5))
    for other in others:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3"])
def test_threads_change_nothing_in_other_families(family: str) -> None:
    checkpoint, ids = random_checkpoint(FAMILIES[family]), tokens(80)
    one, *others = (run(cpu.compile_session(checkpoint, threads=n), ids, [60, 3, 1]) for n in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(one, other)


def greedy(session: CpuSession, prompts: list[list[int]], steps: int) -> list[Floats]:
    """Logits (steps, vocab_size) of each prompt's greedy continuation, all prompts in one batch."""
    sequences = [session.new_sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        session.forward([BatchItem(sequence, prompt[:-1], "none")])
    new = [prompt[-1:] for prompt in prompts]
    rows = []
    for _ in range(steps):
        logits = session.forward([BatchItem(s, n) for s, n in zip(sequences, new, strict=True)])
        rows.append(logits)
        new = [[int(row.argmax())] for row in logits]
    for sequence in sequences:
        sequence.close()
    return [np.stack([row[i] for row in rows]) for i in range(len(prompts))]


def batch_limit(precision: str) -> int:
    """Rows up to which decoding takes the same path as alone (``native/core/linear.cpp``)."""
    if precision == "f32":
        return 20
    return 5 if _core.isa() == "amx" else 8


@pytest.mark.parametrize("weights", ["f32", "q8_0", "q4_0", "q4_1", "q6_k", "iq4_xs"])
@pytest.mark.parametrize("precision", ["fast", "f32"])
def test_decoding_in_a_batch_is_decoding_alone(weights: str, precision: str) -> None:
    config: ModelConfig = replace(CONFIG, intermediate_size=512)
    checkpoint = random_checkpoint(config, weights=weights)
    session = cpu.compile_session(checkpoint, threads=2, precision=precision)
    prompts = [tokens(5 + 13 * i, seed=i) for i in range(batch_limit(precision))]
    alone = [greedy(session, [prompt], 6)[0] for prompt in prompts]
    for size in {2, 3, 4, 5, 8, 20}:
        if size <= len(prompts):
            for one, other in zip(alone, greedy(session, prompts[:size], 6), strict=False):
                np.testing.assert_array_equal(one, other, err_msg=f"{size} sequences")
