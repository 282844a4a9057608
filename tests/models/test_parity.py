"""Every family against transformers, on random small configs with each switch of the family.

Needs torch and transformers.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from nybble.devices.base import BatchItem
from nybble.devices.reference import compile_session
from nybble.graph.rotary import rotary_frequencies
from support.model_cases import CASES
from support.random_models import (
    assert_close,
    check_all_ways,
    checkpoint_of,
    chunks,
    oracle,
    random_model,
    tokens,
)

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    model_type, switches = CASES[case]
    model = random_model(model_type, **switches)
    check_all_ways(compile_session(checkpoint_of(model)), model)


@torch.no_grad()
def test_dynamic_scaling_rotates_each_run_by_the_length_it_reaches() -> None:
    """As transformers with a cache does: keys of earlier runs keep their rotation."""
    model = random_model(
        "llama",
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    session = compile_session(checkpoint_of(model), context_length=64)
    ids = tokens(40)
    assert_close(session.forward([BatchItem(session.new_sequence(), ids, "all")]), oracle(model, ids))
    sequence, cache = session.new_sequence(), None
    for begin, end in chunks(ids, [9, 7, 1]):
        output = model(torch.tensor([ids[begin:end]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = session.forward([BatchItem(sequence, ids[begin:end], "all")])
        assert_close(logits, output.logits[0].numpy())


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if "longrope" in case or case == "phi4-mini"])
def test_generation_across_the_longrope_limit(case: str) -> None:
    """Two sequences cross at different steps of one batch; a fork and a cut-back one follow."""
    model_type, switches = CASES[case]
    model = random_model(model_type, **switches)
    session = compile_session(checkpoint_of(model))
    sequences = [session.new_sequence(), session.new_sequence()]
    ids = [tokens(13), tokens(9, seed=5)]
    new = [list(ids[0]), list(ids[1])]
    for _ in range(12):
        logits = session.forward([BatchItem(s, n) for s, n in zip(sequences, new, strict=True)])
        assert_close(logits, np.concatenate([oracle(model, i)[-1:] for i in ids]))
        new = [[int(row.argmax())] for row in logits]
        ids = [i + n for i, n in zip(ids, new, strict=True)]
    long = sequences[0]
    assert long.length > 16
    short = long.fork()
    short.truncate(10)
    back = [*ids[0][:10], 5]
    assert_close(session.forward([BatchItem(short, [5])]), oracle(model, back)[-1:])
    onward = [*long.tokens, 7]
    assert_close(session.forward([BatchItem(long, [7])]), oracle(model, onward)[-1:])


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    model_type, switches = CASES[case]
    if model_type == "gemma3_text":
        pytest.skip("two embeddings a model; the logits test covers them")
    model = random_model(model_type, **switches)
    config = checkpoint_of(model).config
    embedding = model.model.rotary_emb
    for length in (16, 17):
        embedding(torch.zeros(1), torch.arange(length)[None])
        frequencies, factor = rotary_frequencies(config.rope, length)
        np.testing.assert_allclose(frequencies, embedding.inv_freq.numpy(), rtol=1e-6)
        assert factor == pytest.approx(embedding.attention_scaling)
