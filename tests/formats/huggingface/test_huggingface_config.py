"""config.json: files of transformers 4 and 5, names of old scalings, bad values."""

from __future__ import annotations

import pytest

from nybble.errors import FormatError, UnsupportedError
from nybble.formats.huggingface.config import read_config

PHI3_MINI: dict[str, object] = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2] * 48}


def test_phi3_mini_4k() -> None:
    config = read_config(PHI3_MINI)
    assert (config.head_dim, config.rope.rotary_dim, config.rope.kind) == (96, 96, "default")
    assert [config.layer_window(layer) for layer in (0, 1)] == [2047, 2047]
    assert not config.rope.interleaved


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_mini_128k_under_each_name_that_its_scaling_has_had(name: str) -> None:
    config = read_config(
        {**PHI3_MINI, "max_position_embeddings": 131072, "rope_scaling": {"type": name, **FACTORS}}
    )
    rope = config.rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("longrope", 32.0, 4096)
    assert rope.long_factor == (2.0,) * 48


def test_transformers_4_and_5_say_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = {**PHI3_MINI, "model_type": "llama"}
    old = read_config({**base, "rope_scaling": scaling, "rope_theta": 500000.0})
    del base["rope_theta"]
    new = read_config({**base, "rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert old == new
    assert (old.rope.theta, old.rope.kind) == (500000.0, "llama3")


def test_phi4_mini_rotates_a_part_of_each_head() -> None:
    config = read_config({**PHI3_MINI, "partial_rotary_factor": 0.75, "tie_word_embeddings": True})
    assert (config.head_dim, config.rope.rotary_dim) == (96, 72)
    assert config.tie_word_embeddings


def test_gemma_defaults_and_explicit_null() -> None:
    sizes = {
        k: PHI3_MINI[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    }
    gemma2 = {**sizes, "model_type": "gemma2", "num_hidden_layers": 4}
    config = read_config(gemma2)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert (config.tie_word_embeddings, config.rms_norm_offset) == (True, 1.0)
    assert [config.layer_window(layer) for layer in range(4)] == [4096, None, 4096, None]
    assert read_config({**gemma2, "final_logit_softcapping": None}).logit_softcap is None
    gemma3 = {**sizes, "model_type": "gemma3_text", "num_hidden_layers": 12, "rope_local_base_freq": 777.0}
    config = read_config(gemma3)
    assert [layer for layer in range(12) if config.layer_window(layer) is None] == [5, 11]
    local, full = config.layer_rope(0), config.layer_rope(5)
    assert local is not None and full is not None
    assert (local.theta, full.theta) == (777.0, 1000000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "config.json: hidden_size is 0"),
        ({"num_hidden_layers": "2"}, "config.json: num_hidden_layers must be a whole number, found '2'"),
        ({"num_attention_heads": 31}, "num_attention_heads is 31, which does not divide 3072"),
        ({"vocab_size": None}, "config.json: vocab_size is missing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": [1]}, "rope_scaling must be a mapping"),
        ({"rope_scaling": {"type": "su", **FACTORS, "long_factor": [1.0]}}, "long_factor has 1 items; 48"),
        ({"rope_scaling": {"type": "su", **FACTORS, "long_factor": [0.0] * 48}}, "long_factor is 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ],
)
def test_bad_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_config({**PHI3_MINI, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "unknown model_type 'mamba'; known: llama, mistral"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; known: silu"),
        ({"rope_scaling": {"type": "spiral"}}, "'spiral'; known: default, linear"),
    ],
)
def test_unsupported(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_config({**PHI3_MINI, **change})
