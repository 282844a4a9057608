"""Sequences of a CPU session: windows, forks, cutting back, limits, wrong use, cancelling, threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.devices import cpu
from nybble.devices.base import BatchItem
from nybble.devices.cpu.session import CpuSequence, CpuSession
from nybble.errors import Cancelled, ContextLengthError, DeviceError, OutOfMemoryError
from support.random_checkpoints import (
    FAMILIES,
    LLAMA,
    VOCABULARY,
    WINDOW,
    Floats,
    largest_difference,
    random_checkpoint,
    rope,
    run,
    tokens,
)

SAME = 1e-5
"""Float32 sums may be cut differently; nothing else may differ. Relative to the largest logit."""

LONG = replace(LLAMA, max_position_embeddings=4096)
SLIDING = replace(LONG, **WINDOW)
MIXED = replace(FAMILIES["gemma3"], max_position_embeddings=4096)
PAGE = 64


def session_of(config: object = LONG, **options: object) -> CpuSession:
    return cpu.compile_session(random_checkpoint(config), **{"precision": "f32", "threads": 2, **options})  # type: ignore[arg-type]


def page_bytes(config: object, layers: int) -> int:
    return layers * 2 * config.num_key_value_heads * config.head_dim * PAGE * 4  # type: ignore[attr-defined]


def last(session: CpuSession, sequence: CpuSequence, ids: list[int]) -> Floats:
    return session.forward([BatchItem(sequence, ids)])


def fresh(session: CpuSession, ids: list[int]) -> Floats:
    return last(session, session.new_sequence(), ids)


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 13, 64, 300])
def test_pages_behind_the_window_are_given_back(step: int) -> None:
    session, ids = session_of(SLIDING, max_rows=64), tokens(600)
    sequence, most = session.new_sequence(), 0
    for begin in range(0, 600, step):
        session.forward([BatchItem(sequence, ids[begin : begin + step], "none")])
        most = max(most, session.native.cache_bytes_in_use)
    # A window of 7 lies in two pages at most.
    assert most <= 2 * page_bytes(SLIDING, 3)
    assert largest_difference(last(session, sequence, [5]), fresh(session, [*ids, 5])) < SAME


def test_only_layers_without_window_grow() -> None:
    session = session_of(MIXED)
    sequence = session.new_sequence()
    session.forward([BatchItem(sequence, tokens(640), "none")])
    full, sliding = page_bytes(MIXED, 1), page_bytes(MIXED, 3)
    assert 10 * full < session.native.cache_bytes_in_use <= 10 * full + 2 * sliding


@pytest.mark.parametrize("keep", [0, 1, 30, 63, 64, 65, 120, 128, 193, 199, 200])
def test_cut_back_behind_a_window(keep: int) -> None:
    """Where pages that are needed again are gone, the sequence runs again by itself."""
    for config in (SLIDING, MIXED):
        session, ids, more = session_of(config), tokens(200), tokens(9, seed=2)
        sequence = session.new_sequence()
        session.forward([BatchItem(sequence, ids, "none")])
        sequence.truncate(keep)
        assert sequence.tokens == ids[:keep]
        actual = session.forward([BatchItem(sequence, more, "all")])
        assert largest_difference(actual, run(session, ids[:keep] + more)[keep:]) < SAME
        assert sequence.tokens == ids[:keep] + more


# -- forks and cutting back -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [LONG, SLIDING, MIXED], ids=["full", "sliding", "mixed"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_forks_go_on_independently(config: object, length: int) -> None:
    session, ids = session_of(config), tokens(length)
    one = session.new_sequence()
    session.forward([BatchItem(one, ids, "none")])
    held = session.native.cache_bytes_in_use
    two = one.fork()
    three = two.fork()
    assert session.native.cache_bytes_in_use == held  # shared
    for i, sequence in enumerate((two, one, three)):
        for token in (i, i + 10):
            last(session, sequence, [token])
    batch = [BatchItem(s, [40]) for s in (one, two, three)]
    actual = session.forward(batch)
    expected = [fresh(session, [*ids, i, i + 10, 40]) for i in (1, 0, 2)]
    assert largest_difference(actual, np.concatenate(expected)) < SAME
    one.close()
    three.truncate(length // 2)
    assert largest_difference(last(session, three, [9]), fresh(session, [*ids[: length // 2], 9])) < SAME
    assert largest_difference(last(session, two, [9]), fresh(session, [*ids, 0, 10, 40, 9])) < SAME


def test_a_fork_copies_only_the_page_it_writes() -> None:
    session = session_of()
    one = session.new_sequence()
    session.forward([BatchItem(one, tokens(200), "none")])
    two = one.fork()
    last(session, two, [1])
    assert session.native.cache_bytes_in_use == 5 * page_bytes(LONG, 3)
    one.close()
    assert session.native.cache_bytes_in_use == 4 * page_bytes(LONG, 3)
    two.close()
    two.close()  # harmless
    assert session.native.cache_bytes_in_use == 0


@pytest.mark.parametrize("keep", [0, 1, 63, 64, 65, 99, 100])
def test_cut_back_and_go_on(keep: int) -> None:
    session, ids = session_of(), tokens(100)
    sequence = session.new_sequence()
    session.forward([BatchItem(sequence, ids, "none")])
    sequence.truncate(keep)
    pages = (keep + PAGE - 1) // PAGE
    assert session.native.cache_bytes_in_use == pages * page_bytes(LONG, 3)
    assert largest_difference(last(session, sequence, [3, 4]), fresh(session, [*ids[:keep], 3, 4])) < SAME
    for wrong in (-1, keep + 3):
        with pytest.raises(ValueError, match="cannot truncate"):
            sequence.truncate(wrong)


def test_longrope_crosses_its_limit_both_ways() -> None:
    session, ids = session_of(FAMILIES["phi3-longrope"]), tokens(60)
    sequence = session.new_sequence()
    for end in (39, 40, 41, 45):
        actual = last(session, sequence, ids[sequence.length : end])
        assert largest_difference(actual, fresh(session, ids[:end])) < SAME
    fork = sequence.fork()
    fork.truncate(20)
    assert largest_difference(last(session, fork, [3]), fresh(session, [*ids[:20], 3])) < SAME
    assert largest_difference(last(session, sequence, [3]), fresh(session, [*ids[:45], 3])) < SAME


# -- limits and wrong use -------------------------------------------------------------------------


def test_cache_limit_leaves_the_sequences_as_they_were() -> None:
    limit = 3 * page_bytes(LONG, 3)
    session, ids = session_of(kv_cache_limit=limit, max_rows=64), tokens(300)
    one, two = session.new_sequence(), session.new_sequence()
    session.forward([BatchItem(one, ids[:100], "none")])
    session.forward([BatchItem(two, ids[:10], "none")])
    fork = one.fork()
    for batch in (
        [BatchItem(one, ids[100:300])],
        [BatchItem(two, ids[10:30]), BatchItem(one, ids[100:200])],
        [BatchItem(fork, ids[100:101])],  # a copy of the shared page
    ):
        with pytest.raises(
            OutOfMemoryError, match=rf"limit of {limit} bytes; close sequences.*kv_cache_limit"
        ):
            session.forward(batch)
        assert (one.tokens, two.tokens, fork.tokens) == (ids[:100], ids[:10], ids[:100])
        assert session.native.cache_bytes_in_use == limit
    two.close()
    fork.close()
    expected = fresh(session_of(), ids[:150])
    assert largest_difference(last(session, one, ids[100:150]), expected) < SAME


def test_free_pages_of_one_shape_make_room_for_another() -> None:
    """Pages kept for windows' layers count against the limit; they go before anyone is refused."""
    full, sliding = page_bytes(MIXED, 1), page_bytes(MIXED, 3)
    session = session_of(MIXED, kv_cache_limit=5 * sliding + 9 * full, max_rows=64)
    many = [session.new_sequence() for _ in range(4)]
    session.forward([BatchItem(s, [1, 2], "none") for s in many])
    for sequence in many:
        sequence.close()
    ids = tokens(64 * 15)
    logits = fresh(session, ids)
    assert largest_difference(logits, fresh(session_of(MIXED), ids)) < SAME


def test_context_length_is_checked_before_anything_runs() -> None:
    session = session_of(context_length=20)
    one, two = session.new_sequence(), session.new_sequence()
    last(session, one, tokens(19))
    with pytest.raises(ContextLengthError, match=r"sequence of 19 tokens cannot take 2 more.* is 20"):
        session.forward([BatchItem(two, [1]), BatchItem(one, [1, 2])])
    assert (one.length, two.length) == (19, 0)
    last(session, one, [1])
    assert one.length == 20


@pytest.mark.parametrize("ids", [[-1], [VOCABULARY], [1, 2**31 + 1], [2**32 + 1], [2**63], [1.5]])
def test_ids_outside_the_vocabulary(ids: list[int]) -> None:
    session = session_of()
    one, two = session.new_sequence(), session.new_sequence()
    for batch in ([BatchItem(one, ids)], [BatchItem(two, [1]), BatchItem(one, np.array(ids))]):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"token ids must be whole numbers in 0 .. {VOCABULARY - 1}"):
            session.forward(batch)
    assert one.length == two.length == 0


def test_wrong_use() -> None:
    session, other = session_of(), session_of()
    sequence = session.new_sequence()
    with pytest.raises(ValueError, match="only once"):
        session.forward([BatchItem(sequence, [1]), BatchItem(sequence, [1])])
    with pytest.raises(ValueError, match="'none', 'last' or 'all'"):
        session.forward([BatchItem(sequence, [1], "some")])
    with pytest.raises(ValueError, match="no new tokens"):
        session.forward([BatchItem(sequence, [])])
    with pytest.raises(DeviceError, match="another session"):
        session.forward([BatchItem(other.new_sequence(), [1])])
    with pytest.raises(ValueError, match="another session"):
        ids, output = np.array([1], np.int32), np.empty((1, VOCABULARY), np.float32)
        session.native.forward([(other.new_sequence().cache, ids, 1, 0)], output)
    with pytest.raises(TypeError, match="its own sequences"):
        session.forward([BatchItem(object(), [1])])  # type: ignore[arg-type]
    assert sequence.length == 0
    sequence.close()
    for use in (
        lambda: session.forward([BatchItem(sequence, [1])]),
        sequence.fork,
        lambda: sequence.truncate(0),
    ):
        with pytest.raises(DeviceError, match="sequence was closed"):
            use()
    other.close()
    other.close()
    for use in (other.new_sequence, lambda: other.forward([])):
        with pytest.raises(DeviceError, match="session was closed"):
            use()


def test_close_frees_the_weights() -> None:
    checkpoint = random_checkpoint(LLAMA)
    data = next(iter(checkpoint.tensors.values())).data
    watched = weakref.ref(data)
    session = cpu.compile_session(checkpoint)
    sequence = session.new_sequence()
    last(session, sequence, [1])
    del checkpoint, data
    gc.collect()
    assert watched() is not None
    session.close()
    gc.collect()
    assert watched() is None
    sequence.close()


# -- other threads --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big() -> Checkpoint:
    """Large enough that a prompt takes some tenths of a second."""
    config = replace(
        LLAMA, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, rope=rope(64), max_position_embeddings=8192,
    )  # fmt: skip
    return random_checkpoint(config, weights="q8_0")


@pytest.mark.parametrize("window", [False, True])
def test_cancel(big: Checkpoint, window: bool) -> None:
    if window:
        layers = ("sliding_attention", "full_attention") * 2
        big = replace(big, config=replace(big.config, sliding_window=100, layer_types=layers))
    session, ids = cpu.compile_session(big, precision="f32", threads=2, max_rows=64), tokens(4000)
    session.cancel()  # nothing runs: does nothing
    sequence, other = session.new_sequence(), session.new_sequence()
    last(session, sequence, ids[:200])
    timer = threading.Timer(0.1, session.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        session.forward([BatchItem(other, ids[:50], "none"), BatchItem(sequence, ids[200:])])
    timer.join()
    assert (sequence.tokens, other.length) == (ids[:200], 0)
    actual = last(session, sequence, ids[200:210])
    assert largest_difference(actual, fresh(session, ids[:210])) < SAME


def test_python_goes_on_while_the_core_computes(big: Checkpoint) -> None:
    session, stop, ticks = cpu.compile_session(big, threads=1), threading.Event(), []

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    sequence = session.new_sequence()
    thread.start()
    begin = time.perf_counter()
    session.forward([BatchItem(sequence, tokens(1000), "none")])
    end = time.perf_counter()
    stop.set()
    thread.join()
    inside = [t for t in ticks if begin < t < end]
    assert end - begin > 0.02
    assert len(inside) >= 5, f"{len(inside)} ticks in {end - begin:.3f} s"


def test_close_and_new_sequences_while_it_computes(big: Checkpoint) -> None:
    """Other threads fork, close and close the whole session; the running call ends as if alone."""
    expected = fresh(cpu.compile_session(big, threads=2), tokens(500))
    session = cpu.compile_session(big, threads=2, max_rows=64)
    one = session.new_sequence()
    results: list[Floats] = []
    thread = threading.Thread(target=lambda: results.append(last(session, one, tokens(500))))
    core = session.native
    natives = [core.new_sequence() for _ in range(50)]
    thread.start()
    deadline = time.monotonic() + 10
    while core.cache_bytes_in_use == 0:  # until it runs
        assert time.monotonic() < deadline
    for native in natives:
        native.fork()
        native.clear()
    natives.clear()
    session.close()
    thread.join()
    assert len(results) == 1
    assert largest_difference(results[0], expected) < 2e-2
