"""The reference session: sequences, rows asked for, errors that leave everything as before."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from nybble import devices
from nybble.checkpoint.config import ModelConfig
from nybble.devices.base import BatchItem
from nybble.devices.reference import ReferenceSession, compile_session
from nybble.errors import Cancelled, ContextLengthError, DeviceError
from support.tiny_models import LLAMA, PHI3, VOCABULARY, tiny_checkpoint

IDS = [7, 3, 44, 12, 9, 21]


@pytest.fixture(params=[LLAMA, PHI3], ids=["llama", "phi3"])
def session(request: pytest.FixtureRequest) -> ReferenceSession:
    config: ModelConfig = request.param
    return compile_session(tiny_checkpoint(config))


def test_it_is_a_device_by_name() -> None:
    session = devices.compile(tiny_checkpoint(), device="reference", context_length=12)
    assert session.context_length == 12
    assert session.vocab_size == VOCABULARY


def test_rows_asked_for(session: ReferenceSession) -> None:
    every = session.forward([BatchItem(session.new_sequence(), IDS, "all")])
    assert every.shape == (6, VOCABULARY)
    assert every.dtype == np.float32
    a, b, c = (session.new_sequence() for _ in range(3))
    logits = session.forward(
        [BatchItem(a, IDS, "none"), BatchItem(b, IDS, "last"), BatchItem(c, IDS[:2], "all")]
    )
    np.testing.assert_allclose(logits, every[[5, 0, 1]], rtol=1e-4, atol=1e-5)
    assert (a.length, b.length, c.length) == (6, 6, 2)
    assert session.forward([BatchItem(a, [1], "none")]).shape == (0, VOCABULARY)


def test_fork_and_truncate(session: ReferenceSession) -> None:
    one = session.new_sequence()
    session.forward([BatchItem(one, IDS)])
    two = one.fork()
    session.forward([BatchItem(one, [1])])
    two.truncate(3)
    assert (one.tokens, two.tokens) == ([*IDS, 1], IDS[:3])
    fresh = session.forward([BatchItem(session.new_sequence(), [*IDS[:3], 5])])
    np.testing.assert_allclose(session.forward([BatchItem(two, [5])]), fresh, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sequence of 4 tokens to 5"):
        two.truncate(5)


def test_longrope_repeats_and_returns_new_rows_only() -> None:
    session = compile_session(tiny_checkpoint(PHI3))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, VOCABULARY, 20)]
    sequence = session.new_sequence()
    session.forward([BatchItem(sequence, ids[:15])])
    whole = session.forward([BatchItem(session.new_sequence(), ids, "all")])
    logits = session.forward([BatchItem(sequence, ids[15:], "all")])
    assert logits.shape == (5, VOCABULARY)
    np.testing.assert_allclose(logits, whole[15:], rtol=1e-4, atol=1e-5)
    assert sequence.tokens == ids


def test_context_length_is_checked_before_anything_runs(session: ReferenceSession) -> None:
    a, b = session.new_sequence(), session.new_sequence()
    with pytest.raises(ContextLengthError, match=r"cannot take \d+ more: the context length is 64"):
        session.forward([BatchItem(a, IDS), BatchItem(b, [1] * 65)])
    assert a.length == b.length == 0


def test_cancel_leaves_the_sequences_as_before(session: ReferenceSession) -> None:
    sequence = session.new_sequence()
    session.cancel()  # nothing runs: does nothing
    before = session.forward([BatchItem(sequence, IDS)])
    weight, started = session._weight, threading.Event()

    def cancelling(name: str) -> np.ndarray:
        if not started.is_set():
            started.set()
            thread = threading.Thread(target=session.cancel)
            thread.start()
            thread.join()
        return weight(name)

    session._weight = cancelling  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        session.forward([BatchItem(sequence, [1, 2, 3])])
    assert started.is_set()
    assert sequence.tokens == IDS
    sequence.truncate(5)
    np.testing.assert_allclose(session.forward([BatchItem(sequence, IDS[5:])]), before, rtol=1e-4, atol=1e-5)


def test_wrong_use(session: ReferenceSession) -> None:
    sequence = session.new_sequence()
    with pytest.raises(ValueError, match=f"token ids must be whole numbers in 0 .. {VOCABULARY - 1}"):
        session.forward([BatchItem(sequence, [VOCABULARY])])
    with pytest.raises(ValueError, match="no new tokens"):
        session.forward([BatchItem(sequence, [])])
    with pytest.raises(ValueError, match="only once"):
        session.forward([BatchItem(sequence, [1]), BatchItem(sequence, [1])])
    with pytest.raises(ValueError, match="'none', 'last' or 'all'"):
        session.forward([BatchItem(sequence, [1], "some")])
    sequence.close()
    with pytest.raises(DeviceError, match="closed"):
        session.forward([BatchItem(sequence, [1])])
