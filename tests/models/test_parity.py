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

FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.4, 1.6, 1.9],
    "long_factor": [1.0, 2.0, 5.0, 4.0, 9.0, 12.0, 20.0, 30.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
GEMMA = {"head_dim": 24, "num_key_value_heads": 2, "sliding_window": 6}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-grouped-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 2}},
    ),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
    "mistral-window": ("mistral", {"sliding_window": 7, "num_key_value_heads": 2}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "num_key_value_heads": 2}),
    "smollm3-layers": ("smollm3", {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False}),
    "smollm3-window": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2},
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "num_key_value_heads": 2}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "phi3-mini-4k": ("phi3", {"sliding_window": 11, "original_max_position_embeddings": 128}),
    "phi3-medium": ("phi3", {"num_key_value_heads": 2, "sliding_window": 15}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3-longrope-window": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 6},
    ),
    "phi3-longrope-factor": (
        "phi3",
        {
            "rope_parameters": {**LONGROPE, "attention_factor": 1.4},
            "original_max_position_embeddings": 16,
        },
    ),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": FACTORS["short_factor"][:6],
                "long_factor": FACTORS["long_factor"][:6],
            },
            "original_max_position_embeddings": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 20}),
    "gemma2-caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}),
    "gemma2-no-caps": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6, "query_pre_attn_scalar": 20}),
    "gemma3-pattern": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0}),
    "gemma3-linear": (
        "gemma3_text",
        {
            **GEMMA,
            "sliding_window_pattern": 3,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}


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
