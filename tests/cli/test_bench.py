"""``nybble bench``: arguments, table and JSON, with a session that only counts."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("nybble._core", reason="the native core is not built")


class Sequence:
    def fork(self):
        return self

    def close(self):
        pass


class Session:
    vocab_size = 10
    context_length = 4096
    threads = 3

    def new_sequence(self):
        return Sequence()

    def forward(self, batch):
        return np.zeros((1, 10), np.float32)


@pytest.fixture
def bench_model(fake_model):
    fake_model.session = Session()
    fake_model.load_seconds = 0.25
    return fake_model


def test_json(nybble_command, bench_model):
    argv = [
        "bench",
        "m",
        "--prefill",
        "8,16",
        "--decode",
        "4",
        "--depth",
        "0,32",
        "--repetitions",
        "3",
        "--json",
    ]
    result = nybble_command(*argv, "--threads", "3")
    assert result.code == 0
    value = json.loads(result.out)
    assert value["threads"] == 3
    assert value["load_seconds"] == 0.25
    assert value["peak_memory_bytes"] > 0
    assert value["isa"]
    cases = [(row["phase"], row["tokens"], row["depth"]) for row in value["results"]]
    assert cases == [
        ("prefill", 8, 0), ("prefill", 16, 0), ("decode", 4, 0),
        ("prefill", 8, 32), ("prefill", 16, 32), ("decode", 4, 32),
    ]  # fmt: skip
    for row in value["results"]:
        assert len(row["seconds"]) == 3
        rates = row["tokens_per_second"]
        assert rates["slowest"] <= rates["median"] <= rates["fastest"]
    assert bench_model.loaded[0][1]["threads"] == 3


def test_table(nybble_command, bench_model):
    out = nybble_command("bench", "m", "--prefill", "0", "--decode", "4", "--repetitions", "1").out
    facts, _, table = out.partition("\n\n")
    assert "instruction set  " in facts
    header, row = table.splitlines()
    assert header.split()[:4] == ["PHASE", "TOKENS", "DEPTH", "TOKENS/S"]
    assert row.split()[:3] == ["decode", "4", "0"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefill", "0", "--decode", "0"], "nothing to measure"),
        (["--prefill=-5"], "a length is negative"),
        (["--depth", "x"], "invalid lengths value: 'x'"),
        (["--repetitions", "0"], "0 is not above 0"),
    ],
)
def test_wrong_use(nybble_command, bench_model, argv, message):
    result = nybble_command("bench", "m", *argv)
    assert result.code == 2
    assert message in result.err
    assert bench_model.loaded == []


def test_too_long_for_the_context(nybble_command, bench_model):
    result = nybble_command("bench", "m", "--depth", "4096")
    assert result.code == 1
    assert "need a context of 4608 tokens, but the session allows 4096" in result.err
