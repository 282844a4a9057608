"""The benchmark counts the right work: lengths, depths, repetitions and what is left untimed."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.errors import ContextLengthError
from nybble.evaluate.benchmark import Measurement, load_average, measure, peak_memory


class FakeSequence:
    def __init__(self, session, tokens=()):
        self.session = session
        self.tokens = list(tokens)
        session.open += 1

    @property
    def length(self):
        return len(self.tokens)

    def fork(self):
        return FakeSequence(self.session, self.tokens)

    def close(self):
        self.session.open -= 1


class FakeSession:
    """A session whose clock advances one second a call and a tenth of a second a token."""

    vocab_size = 50
    context_length = 200

    def __init__(self):
        self.now = 0.0
        self.calls = []
        self.open = 0

    def new_sequence(self):
        return FakeSequence(self)

    def forward(self, batch):
        (item,) = batch
        assert all(0 <= token < self.vocab_size for token in item.tokens)
        self.calls.append((item.sequence.length, len(item.tokens), item.logits))
        item.sequence.tokens += item.tokens
        self.now += 1 + 0.1 * len(item.tokens)
        return np.zeros((0 if item.logits == "none" else 1, self.vocab_size), np.float32)

    def clock(self):
        return self.now


def run(session, **options):
    return list(measure(session, clock=session.clock, **options))


def test_times_lengths_and_depths():
    session = FakeSession()
    results = run(session, prefill=[10, 20], decode=[4], depths=[0, 100], repetitions=3)
    assert [(m.phase, m.tokens, m.depth) for m in results] == [
        ("prefill", 10, 0), ("prefill", 20, 0), ("decode", 4, 0),
        ("prefill", 10, 100), ("prefill", 20, 100), ("decode", 4, 100),
    ]  # fmt: skip
    seconds = {(m.phase, m.tokens): m.seconds for m in results}
    assert seconds["prefill", 10] == pytest.approx((2.0,) * 3)
    assert seconds["prefill", 20] == pytest.approx((3.0,) * 3)
    assert seconds["decode", 4] == pytest.approx((4 * 1.1,) * 3)
    assert session.open == 0


def test_decode_is_one_token_a_call_on_top_of_the_depth():
    session = FakeSession()
    run(session, prefill=[], decode=[3], depths=[7], repetitions=1)
    assert session.calls[0] == (0, 7, "none")
    # One warm-up, one repetition, both starting at the depth.
    assert session.calls[1:] == [(7, 1, "last"), (8, 1, "last"), (9, 1, "last")] * 2


def test_statistics():
    measurement = Measurement("prefill", 100, 0, (1.0, 2.0, 4.0))
    assert measurement.rates == (100.0, 50.0, 25.0)
    assert measurement.median == 50.0
    assert measurement.spread == (25.0, 100.0)


def test_too_long_for_the_context():
    session = FakeSession()
    with pytest.raises(ContextLengthError, match="depth 150 and 64 tokens need a context of 214 tokens"):
        run(session, prefill=[64], decode=[], depths=[150])
    assert session.calls == []


@pytest.mark.parametrize(
    "wrong",
    [{"prefill": [], "decode": []}, {"prefill": [0]}, {"depths": [-1]}, {"depths": []}, {"repetitions": 0}],
)
def test_wrong_lengths(wrong):
    with pytest.raises(ValueError, match=r"at least 1|nothing to measure"):
        run(FakeSession(), **wrong)


def test_sequences_are_closed_after_a_failure():
    session = FakeSession()
    original = session.forward

    def fail(batch):
        if session.calls:
            raise RuntimeError("device lost")
        return original(batch)

    session.forward = fail
    with pytest.raises(RuntimeError, match="device lost"):
        run(session, prefill=[8], decode=[2], depths=[5])
    assert session.open == 0


def test_peak_memory_grows_with_use():
    before = peak_memory()
    block = np.ones(64_000_000, np.uint8)
    after = peak_memory()
    assert before is not None and after is not None
    assert after > 20_000_000
    assert after >= before
    assert block[-1] == 1


def test_load_average_is_a_count_or_absent():
    load = load_average()
    assert load is None or load >= 0
