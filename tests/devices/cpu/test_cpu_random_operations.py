"""Random operations on sequences of a model with windows, against the reference device step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nybble.devices import cpu, reference
from nybble.devices.base import BatchItem, Sequence
from nybble.errors import ContextLengthError
from support.random_checkpoints import FAMILIES, VOCABULARY, largest_difference, random_checkpoint

CONFIG = replace(
    FAMILIES["gemma3"],
    num_hidden_layers=3,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    sliding_window=50,
    max_position_embeddings=330,
)
CHECKPOINT = random_checkpoint(CONFIG)
PLAIN = reference.compile_session(CHECKPOINT)
MOST = 6


class Operations(RuleBasedStateMachine):
    """Each sequence exists on both devices."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Sequence, Sequence]] = []

    @initialize(max_rows=st.sampled_from([1000, 64, 33]), threads=st.integers(1, 3))
    def compile(self, max_rows: int, threads: int) -> None:
        self.session = cpu.compile_session(CHECKPOINT, precision="f32", threads=threads, max_rows=max_rows)

    def pick(self, index: int) -> tuple[Sequence, Sequence]:
        if not self.pairs:
            self.pairs.append((self.session.new_sequence(), PLAIN.new_sequence()))
        return self.pairs[index % len(self.pairs)]

    @rule()
    def new(self) -> None:
        if len(self.pairs) < MOST:
            self.pairs.append((self.session.new_sequence(), PLAIN.new_sequence()))

    @rule(
        appended=st.lists(
            st.tuples(
                st.integers(0, MOST - 1),
                st.one_of(st.integers(1, 3), st.integers(1, 150)),
                st.sampled_from(["last", "all", "none"]),
            ),
            min_size=1, max_size=4, unique_by=lambda a: a[0],
        ),
        seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def append(self, appended: list[tuple[int, int, str]], seed: int) -> None:
        random = np.random.default_rng(seed)
        batches: tuple[list[BatchItem], list[BatchItem]] = ([], [])
        seen = []
        for index, count, kind in appended:
            pair = self.pick(index)
            if pair in seen:
                continue
            seen.append(pair)
            ids = [int(token) for token in random.integers(0, VOCABULARY, count)]
            for sequence, batch in zip(pair, batches, strict=True):
                batch.append(BatchItem(sequence, ids, kind))
        try:
            expected = PLAIN.forward(batches[1])
        except ContextLengthError:
            with pytest.raises(ContextLengthError):
                self.session.forward(batches[0])
            return
        actual = self.session.forward(batches[0])
        assert actual.shape == expected.shape
        if len(expected):
            assert largest_difference(actual, expected) < 1e-4

    @rule(index=st.integers(0, MOST - 1))
    def fork(self, index: int) -> None:
        one, two = self.pick(index)
        if len(self.pairs) < MOST:
            self.pairs.append((one.fork(), two.fork()))

    @rule(index=st.integers(0, MOST - 1), share=st.floats(0, 1), some=st.integers(0, 3))
    def truncate(self, index: int, share: float, some: int) -> None:
        one, two = self.pick(index)
        length = max(0, round(one.length * share) - some)
        one.truncate(length)
        two.truncate(length)

    @rule(index=st.integers(0, MOST - 1))
    def close(self, index: int) -> None:
        one, two = self.pick(index)
        one.close()
        two.close()
        self.pairs.remove((one, two))

    @invariant()
    def same_tokens(self) -> None:
        for one, two in self.pairs:
            assert one.tokens == two.tokens

    def teardown(self) -> None:
        for one, _ in self.pairs:
            one.close()
        if hasattr(self, "session"):
            assert self.session.native.cache_bytes_in_use == 0


QUICK = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
TestRandomOperations = Operations.TestCase
TestRandomOperations.settings = QUICK


class LongOperations(Operations):
    """The same for longer."""


TestManyRandomOperations = pytest.mark.slow(LongOperations.TestCase)
TestManyRandomOperations.settings = settings(QUICK, max_examples=300, stateful_step_count=50)
