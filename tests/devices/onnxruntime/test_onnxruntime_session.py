"""Sequences on ONNX Runtime: however tokens are cut into runs, forked and truncated, logits are the same."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from devices.onnxruntime.conftest import DATA, start
from nybble.devices.base import BatchItem
from nybble.errors import Cancelled, ContextLengthError, DeviceError, OutOfMemoryError
from support.onnx_decoders import LONGEST, VOCABULARY, reference, save_decoder

TOLERANCE = 1e-4


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 95, count).tolist()


def all_logits(session, ids, pieces=()):
    """Logits of every token, run in pieces of these sizes and then the rest."""
    sequence = session.new_sequence()
    rows, at = [], 0
    for size in (*pieces, len(ids)):
        part = ids[at : at + size]
        if part:
            rows.append(session.forward([BatchItem(sequence, part, "all")]))
        at += len(part)
    sequence.close()
    return np.concatenate(rows)


def growing(config):
    config["search"]["past_present_share_buffer"] = False


@pytest.fixture(params=["shared", "growing", "standard operators"])
def session(request, folder, tmp_path):
    """Every kind of cache."""
    if request.param == "standard operators":
        made = start(save_decoder(tmp_path / "decoder"), context_length=LONGEST)
    else:
        made = start(folder("llama-int4-cpu", None if request.param == "shared" else growing))
        assert made._io.shares_buffers == (request.param == "shared")
    yield made
    made.close()


def ids_for(session, count, seed=0):
    return [token % session.vocab_size for token in tokens(count, seed)]


def test_pieces_do_not_matter(session):
    ids = ids_for(session, 30)
    whole = all_logits(session, ids)
    assert whole.shape == (30, session.vocab_size) and whole.dtype == np.float32
    for pieces in ((1,) * 29, (7, 7, 1, 1), (29,)):
        np.testing.assert_allclose(all_logits(session, ids, pieces), whole, atol=TOLERANCE)


def test_standard_operators_equal_the_reference(tmp_path):
    ids = [token % VOCABULARY for token in tokens(30)]
    expected = reference(ids)
    for number, switches in enumerate(
        (
            {},
            {"past": "past_key_values.%d", "present": "present_key_values.%d"},
            {"id_type": 6},
            {"position_rank": 3},
            {"keeps_rows": True},
            {"last_row_only": True},
        )
    ):
        session = start(save_decoder(tmp_path / str(number), **switches), context_length=LONGEST)
        np.testing.assert_allclose(all_logits(session, ids, (11, 1, 1)), expected, atol=TOLERANCE)
        sequence = session.new_sequence()
        last = session.forward(
            [
                BatchItem(sequence, ids[:9], "none"),
            ]
        )
        assert last.shape == (0, VOCABULARY)
        last = session.forward([BatchItem(sequence, ids[9:], "last")])
        np.testing.assert_allclose(last, expected[-1:], atol=TOLERANCE)


def test_forks_are_independent(session):
    ids, other = ids_for(session, 20), ids_for(session, 20, seed=1)
    first = session.new_sequence()
    session.forward([BatchItem(first, ids[:12], "none")])
    second = first.fork()
    assert second.tokens == ids[:12]
    a = session.forward([BatchItem(second, other[12:], "all")])
    b = session.forward([BatchItem(first, ids[12:], "all")])
    np.testing.assert_allclose(a, all_logits(session, ids[:12] + other[12:])[12:], atol=TOLERANCE)
    np.testing.assert_allclose(b, all_logits(session, ids)[12:], atol=TOLERANCE)
    third = first.fork()
    first.close()
    c = session.forward([BatchItem(third, other[:3], "all")])
    np.testing.assert_allclose(c, all_logits(session, ids + other[:3])[20:], atol=TOLERANCE)


def test_truncate_forgets(session):
    ids, other = ids_for(session, 20), ids_for(session, 20, seed=1)
    sequence = session.new_sequence()
    session.forward([BatchItem(sequence, ids, "none")])
    for length in (13, 5, 0):
        sequence.truncate(length)
        assert sequence.tokens == ids[:length]
        found = session.forward([BatchItem(sequence, other[:4], "all")])
        expected = all_logits(session, ids[:length] + other[:4])[length:]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        sequence.truncate(length)
    with pytest.raises(ValueError, match="cannot truncate a sequence of 0 tokens to 1"):
        sequence.truncate(1)


def test_a_batch_of_ragged_sequences(session):
    one, two, three = ids_for(session, 9, 1), ids_for(session, 1, 2), ids_for(session, 5, 3)
    sequences = [session.new_sequence() for _ in range(4)]
    found = session.forward(
        [
            BatchItem(sequences[0], one, "all"),
            BatchItem(sequences[1], two, "last"),
            BatchItem(sequences[2], three, "none"),
            BatchItem(sequences[3], [], "all"),
        ]
    )
    assert [s.length for s in sequences] == [9, 1, 5, 0]
    expected = np.concatenate([all_logits(session, one), all_logits(session, two)])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    found = session.forward([BatchItem(s, [7], "last") for s in reversed(sequences)])
    expected = [all_logits(session, [*ids, 7])[-1] for ids in ([], three, two, one)]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_a_long_prompt_grows_the_buffer(session):
    ids = ids_for(session, session.context_length)
    whole = all_logits(session, ids)
    np.testing.assert_allclose(all_logits(session, ids, (1,) * len(ids)), whole, atol=TOLERANCE)


def test_what_is_refused(session):
    sequence, other = session.new_sequence(), session.new_sequence()
    with pytest.raises(ContextLengthError, match="context length is"):
        session.forward([BatchItem(sequence, [3] * (session.context_length + 1), "last")])
    with pytest.raises(ValueError, match="token ids"):
        session.forward([BatchItem(sequence, [session.vocab_size], "last")])
    with pytest.raises(ValueError, match="only once"):
        session.forward([BatchItem(sequence, [3], "last"), BatchItem(sequence, [3], "last")])
    with pytest.raises(ValueError, match="no new tokens"):
        session.forward([BatchItem(sequence, [], "last")])
    with pytest.raises(ValueError, match="'none', 'last' or 'all'"):
        session.forward([BatchItem(sequence, [3], "first")])
    assert sequence.length == 0
    other.close()
    other.close()
    with pytest.raises(DeviceError, match="was closed"):
        session.forward([BatchItem(other, [3], "last")])
    session.close()
    with pytest.raises(DeviceError, match="session was closed"):
        session.forward([BatchItem(sequence, [3], "last")])


def test_a_sequence_of_another_session(folder, tmp_path):
    one, two = start(folder("llama-int4-cpu")), start(DATA / "llama-int4-cpu")
    with pytest.raises(DeviceError, match="another session"):
        two.forward([BatchItem(one.new_sequence(), [3], "last")])


def test_cancel_leaves_the_sequences_as_before(session, monkeypatch):
    ids = ids_for(session, 20)
    one, two = session.new_sequence(), session.new_sequence()
    session.forward([BatchItem(one, ids[:8], "none")])
    session.cancel()  # nothing runs: means nothing
    run, calls = session.decoder.run, []

    def cancelled_in_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            thread = threading.Thread(target=session.cancel)
            thread.start()
            thread.join()
        return run(*arguments, **options)

    monkeypatch.setattr(session.decoder, "run", cancelled_in_the_second)
    with pytest.raises(Cancelled):
        session.forward([BatchItem(one, ids[8:12], "last"), BatchItem(two, ids, "last")])
    assert (one.length, two.length) == (8, 0)
    found = session.forward([BatchItem(one, ids[8:], "all")])
    np.testing.assert_allclose(found, all_logits(session, ids)[8:], atol=TOLERANCE)


def test_the_cache_limit():
    session = start(DATA / "llama-int4-cpu", context_length=64)
    sequence = session.new_sequence()
    session.forward([BatchItem(sequence, [3], "none")])
    one = sequence.cache.nbytes
    assert one == 2 * 2 * 16 * 4 * 64  # keys and values, layers, width, float32, positions
    session = start(DATA / "llama-int4-cpu", kv_cache_limit=2 * one)
    sequences = [session.new_sequence() for _ in range(3)]
    session.forward([BatchItem(s, [3], "none") for s in sequences[:2]])
    with pytest.raises(OutOfMemoryError, match="kv_cache_limit"):
        session.forward([BatchItem(sequences[2], [3], "none")])
    fork = sequences[0].fork()  # takes nothing until it is written
    with pytest.raises(OutOfMemoryError):
        session.forward([BatchItem(fork, [3], "none")])
    sequences[1].close()
    session.forward([BatchItem(fork, [3], "none")])


@pytest.mark.parametrize("name", ["phi3-longrope-int4-cpu", "phi3-longrope-int4-dml"])
def test_longrope_crossing_runs_again(name, monkeypatch):
    """The model has 16 positions of the short kind; what was cached before is computed anew."""
    session = start(DATA / name)
    assert session._io.switch.length == 16
    assert session._pads_masks == name.endswith("cpu")
    ids = tokens(40)
    long = all_logits(session, ids)
    short = all_logits(session, ids[:16])
    assert np.abs(long[:16] - short).max() > 0.1  # the two kinds differ
    tolerance = 0.02 if name.endswith("dml") else TOLERANCE  # float16
    for pieces in ((1,) * 39, (16, 1), (15, 1, 1), (10, 7), (7, 7, 7)):
        found = all_logits(session, ids, pieces)
        np.testing.assert_allclose(found[20:], long[20:], atol=tolerance)
    monkeypatch.setattr("nybble.devices.onnxruntime.session.MAX_ROWS", 6)  # padded masks, or one run
    np.testing.assert_allclose(all_logits(session, ids, (20,)), long, atol=tolerance)
    session._pads_masks = False
    np.testing.assert_allclose(all_logits(session, ids, (20,)), long, atol=tolerance)
    batch = [session.new_sequence() for _ in range(3)]
    session.forward([BatchItem(s, ids[: 14 + i], "none") for i, s in enumerate(batch)])
    found = session.forward([BatchItem(s, ids[14 + i : 17 + i], "last") for i, s in enumerate(batch)])
    expected = [all_logits(session, ids[: 17 + i])[-1] for i in range(3)]
    np.testing.assert_allclose(found, expected, atol=tolerance)
    batch[2].truncate(10)
    found = session.forward([BatchItem(batch[2], ids[10:16], "all")])
    np.testing.assert_allclose(found, short[10:], atol=tolerance)


def test_placement_is_known():
    session = start(DATA / "llama-int4-cpu")
    assert session.provider == "cpu"
    assert session.placement["CPUExecutionProvider"]["GroupQueryAttention"] == 2


@pytest.mark.parametrize("name", ["llama-int4-cpu", "phi3-longrope-int4-dml"])
def test_a_provider_that_cannot_continue(name, monkeypatch):
    """It gets a whole sequence, or one token after cached ones, and nothing between."""
    session = start(DATA / name)
    ids = tokens(30)
    expected = all_logits(session, ids)[20:]
    session.runs = "whole or one"
    run, seen = session.decoder.run, []

    def noted(cache, new, begin, **rest):
        seen.append((begin, len(new)))
        return run(cache, new, begin, **rest)

    monkeypatch.setattr(session.decoder, "run", noted)
    for pieces in ((), (25, 2), (3, 9, 1, 10), (20, 1, 1)):
        np.testing.assert_allclose(all_logits(session, ids, pieces)[20:], expected, atol=0.02)
    assert {count for begin, count in seen if begin} == {1}
    monkeypatch.setattr("nybble.devices.onnxruntime.session.STEP_COST", 1)
    np.testing.assert_allclose(all_logits(session, ids, (25, 4))[20:], expected, atol=0.02)
    assert seen[-2:] == [(28, 1), (29, 1)]
    if name.startswith("llama"):
        session.runs = "one"
        np.testing.assert_allclose(all_logits(session, ids, (25, 4))[20:], expected, atol=TOLERANCE)
        assert {count for _, count in seen[-30:]} == {1}
