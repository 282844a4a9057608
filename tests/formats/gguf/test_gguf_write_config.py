"""Config to GGUF keys: what a reader makes of them is the same model, for every family."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.config import LayerType, ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.formats.gguf.config import ARCHITECTURES, read_config
from nybble.formats.gguf.llama_cpp_notes import llama_cpp_notes
from nybble.formats.gguf.write_config import check_config, config_metadata, config_tensors, differences
from nybble.graph import rotary_frequencies


def zeros(name: str, *shape: int) -> Tensor:
    return Tensor(name, shape, encoding("f32"), np.zeros(4 * math.prod(shape), np.uint8))


def file_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """As many tensors as a reader looks at."""
    tensors = [*config_tensors(config), zeros("token_embd.weight", config.vocab_size, config.hidden_size)]
    tensors += [zeros(f"blk.{i}.attn_norm.weight", 1) for i in range(config.num_hidden_layers)]
    if not config.tie_word_embeddings:
        tensors.append(zeros("output.weight", 1, 1))
    names = {
        "attn_qkv.bias" if config.architecture == "phi3" else "attn_q.bias": config.attention_bias,
        "attn_output.bias": config.attention_output_bias,
        "ffn_down.bias": config.mlp_bias,
        "attn_q_norm.weight": config.query_key_norm,
    }
    tensors += [zeros(f"blk.0.{name}", 1) for name, there in names.items() if there]
    return {tensor.name: tensor for tensor in tensors}


def stored(metadata: dict[str, object]) -> dict[str, object]:
    """Floats as a file holds them."""
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in metadata.items()}


def read_back(config: ModelConfig) -> ModelConfig:
    tensors = file_tensors(config)
    check_config(config, config_metadata(config), tensors)
    return read_config(stored(config_metadata(config)), tensors, "model.gguf")


f32 = st.floats(2**-10, 1024, width=32)
small = f32 | st.just(1.0)


def windows(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    if not draw(st.booleans()):
        return {}
    kinds: list[LayerType] = ["sliding_attention", "full_attention"]
    given = draw(st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers))
    if "sliding_attention" not in given:
        return {}
    return {"sliding_window": draw(st.integers(1, 10**6)), "layer_types": tuple(given)}


def scalings(draw: st.DrawFn, rope: RopeConfig, architecture: str, context: int) -> RopeConfig:
    half = rope.rotary_dim // 2
    divisors = st.tuples(*[st.floats(0.5, 100, width=32)] * half)
    kinds = ["default", "linear", "yarn", "factors"] + ["longrope"] * (architecture == "phi3")
    kind = draw(st.sampled_from(kinds))
    original = draw(st.integers(64, context))
    if kind == "factors":
        return replace(rope, frequency_factors=draw(divisors))
    if kind == "linear":
        return replace(rope, kind="linear", factor=draw(st.floats(0.25, 64, width=32)))
    if kind == "yarn":
        return replace(
            rope,
            kind="yarn",
            factor=draw(st.floats(1, 64, width=32)),
            original_max_position_embeddings=original,
            attention_factor=draw(st.none() | st.floats(0.5, 2, width=32)),
            beta_fast=draw(st.sampled_from([32.0, 16.0])),
            beta_slow=draw(st.sampled_from([1.0, 2.0])),
            mscale=draw(st.sampled_from([0.0, 1.0])),
            mscale_all_dim=draw(st.sampled_from([0.0, 0.5])),
        )
    if kind == "longrope":
        return replace(
            rope,
            kind="longrope",
            factor=context / original,
            original_max_position_embeddings=original,
            short_factor=draw(divisors),
            long_factor=draw(divisors),
            attention_factor=draw(st.none() | st.floats(0.5, 2, width=32)),
        )
    return rope


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    architecture = draw(st.sampled_from(sorted(ARCHITECTURES)))
    row = ARCHITECTURES[architecture]
    gemma = architecture.startswith("gemma")
    layers = draw(st.sampled_from([1, 2, 6, 7, 13, 32, 46, 62]))
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    head_dim = draw(st.sampled_from([8, 16, 64]))
    hidden = heads * draw(st.sampled_from([8, 16, 48]))
    context = draw(st.sampled_from([128, 4096, 131072]))
    # phi-4-mini rotates three quarters of each head.
    rotary = draw(st.sampled_from([head_dim, head_dim * 3 // 4]))
    rope = RopeConfig(draw(st.floats(10, 1e6, width=32)), rotary, interleaved=row.permuted)
    rope = scalings(draw, rope, architecture, context)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=draw(st.integers(1, 300000)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 99999)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([n for n in (1, 2, 4, 6) if heads % n == 0])),
        head_dim=head_dim,
        max_position_embeddings=context,
        rope=rope,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        hidden_act=row.hidden_act,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        query_key_norm=draw(st.booleans()),
        attention_scale=draw(st.none() | st.floats(2**-10, 1, width=32)),
        logit_scale=draw(small),
        residual_scale=draw(small),
        embedding_scale=math.sqrt(hidden) if gemma else draw(small),
        **windows(draw, layers),
    )
    if architecture == "smollm3":
        config = replace(config, rope_layers=tuple(bool((i + 1) % 4) for i in range(layers)))
    if gemma:
        caps = st.none() | st.floats(1, 100, width=32)
        config = replace(config, attention_softcap=draw(caps), logit_softcap=draw(caps))
    if architecture == "gemma3":
        config = replace(config, rope_local=RopeConfig(draw(st.floats(10, 1e6, width=32)), rotary))
    return config


@given(configs())
@settings(max_examples=150, deadline=None)
def test_a_reader_finds_the_same_model(config: ModelConfig) -> None:
    found = read_back(config)
    assert differences(config, found) == []
    # And what the mathematics takes from it is the same, whatever the fields say.
    for layer in range(config.num_hidden_layers):
        assert found.layer_window(layer) == config.layer_window(layer)
        ours, theirs = config.layer_rope(layer), found.layer_rope(layer)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            for length in (1, 200000):
                a, b = rotary_frequencies(ours, length), rotary_frequencies(theirs, length)
                np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
                assert math.isclose(a[1], b[1], rel_tol=1e-6)


LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=10,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    rope=RopeConfig(10000.0, 16, interleaved=True),
    tie_word_embeddings=True,
)
PHI3 = replace(LLAMA, architecture="phi3", rope=RopeConfig(10000.0, 16))
SLIDING: tuple[LayerType, ...] = ("sliding_attention",) * 4


def test_equal_where_nothing_is_rounded() -> None:
    config = replace(LLAMA, rms_norm_eps=2**-20)
    assert read_back(config) == config


def test_keys_of_phi3_with_longrope() -> None:
    config = replace(
        PHI3,
        max_position_embeddings=131072,
        sliding_window=262144,
        layer_types=SLIDING,
        rope=RopeConfig(
            10000.0,
            12,
            "longrope",
            factor=32.0,
            original_max_position_embeddings=4096,
            short_factor=(1.0,) * 6,
            long_factor=(2.0,) * 6,
        ),
    )
    keys = config_metadata(config)
    assert keys["general.architecture"] == "phi3"
    assert keys["phi3.context_length"] == 131072
    assert keys["phi3.rope.dimension_count"] == 12
    assert keys["phi3.attention.sliding_window"] == 262144
    assert keys["phi3.rope.scaling.original_context_length"] == 4096
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx(
        math.sqrt(1 + math.log(32) / math.log(4096))
    )
    names = {tensor.name: tensor for tensor in config_tensors(config)}
    assert set(names) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    np.testing.assert_array_equal(names["rope_factors_long.weight"].dequantize(), np.full(6, 2.0))


def test_no_window_is_said_where_readers_expect_one() -> None:
    old_mini = replace(PHI3, max_position_embeddings=4096, num_hidden_layers=32)
    assert config_metadata(old_mini)["phi3.attention.sliding_window"] == 0
    assert read_back(old_mini).layer_window(0) is None
    assert "llama.attention.sliding_window" not in config_metadata(LLAMA)


def test_mistral_is_written_as_llama_with_its_window() -> None:
    mistral = replace(LLAMA, architecture="mistral", sliding_window=100, layer_types=SLIDING)
    keys = config_metadata(mistral)
    assert keys["general.architecture"] == "llama"
    assert keys["llama.attention.sliding_window"] == 100
    found = read_back(mistral)
    assert (found.architecture, found.layer_window(3)) == ("llama", 100)


def test_llama3_divisors_are_a_tensor() -> None:
    config = replace(LLAMA, rope=replace(LLAMA.rope, frequency_factors=(1.0, 1.5) * 4))
    assert [tensor.name for tensor in config_tensors(config)] == ["rope_freqs.weight"]
    assert read_back(config).rope.frequency_factors == (1.0, 1.5) * 4


def test_gemma_leaves_out_what_readers_know() -> None:
    gemma = replace(
        LLAMA,
        architecture="gemma3",
        hidden_act="gelu_pytorch_tanh",
        rope=RopeConfig(1e6, 16),
        rope_local=RopeConfig(10000.0, 16),
        num_hidden_layers=6,
        sliding_window=512,
        layer_types=("sliding_attention",) * 5 + ("full_attention",),
        embedding_scale=8.0,
        attention_scale=0.25,
        query_key_norm=True,
    )
    keys = config_metadata(gemma)
    assert {"gemma3.attention.scale", "gemma3.embedding_scale"}.isdisjoint(keys)
    assert "gemma3.attention.sliding_window_pattern" not in keys
    assert "gemma3.attention.scale" in config_metadata(replace(gemma, attention_scale=0.5))
    other = replace(gemma, layer_types=("full_attention",) + ("sliding_attention",) * 5)
    assert read_back(other).layer_types == other.layer_types


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": RopeConfig(10000.0, 16)}, r"not in GGUF form: q and k of llama .* neighbouring"),
        ({"rms_norm_offset": 1.0}, "not in GGUF form: rms_norm_offset is 1.0"),
        (
            {
                "rope": RopeConfig(
                    10000.0, 16, "llama3", True, factor=8.0, original_max_position_embeddings=64
                )
            },
            "must be given as frequency_factors",
        ),
    ],
)
def test_other_forms_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_metadata(replace(LLAMA, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act silu instead of gelu"),
        ({"attention_softcap": 30.0}, "attention_softcap None instead of 30.0"),
        ({"rope_layers": (True, False, True, True)}, "rope_layers"),
        ({"attention_bias": True}, "attention_bias False instead of True"),
        ({"architecture": "smollm3", "rope_layers": (False,) * 4}, "rope_layers"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings True instead of False"),
        ({"rope": RopeConfig(1e4, 16, "linear", True, factor=2.0, attention_factor=3.0)}, "attention_factor"),
    ],
)
def test_what_no_key_can_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match="GGUF cannot express this") as caught:
        config = replace(LLAMA, **changes)
        check_config(config, config_metadata(config), file_tensors(LLAMA))
    assert message in str(caught.value)


def test_scaling_by_length_has_no_keys() -> None:
    rope = replace(LLAMA.rope, kind="dynamic", factor=2.0, original_max_position_embeddings=2048)
    config = replace(LLAMA, rope=rope)
    with pytest.raises(UnsupportedError, match="kind default instead of dynamic"):
        check_config(config, config_metadata(config), file_tensors(config))


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(UnsupportedError, match="no architecture 'mamba' that nybble knows; known: llama"):
        config_metadata(replace(LLAMA, architecture="mamba"))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"attention_scale": 0.5, "logit_scale": 2.0}, "ignores attention.scale and logit_scale in llama"),
        (
            {"architecture": "mistral", "sliding_window": 9, "layer_types": SLIDING},
            "sliding window of 9 in llama",
        ),
        ({"architecture": "qwen2", "rope": RopeConfig(1e4, 12)}, "rotate a part of each head"),
        (
            {"architecture": "qwen2", "rope": RopeConfig(1e4, 16, frequency_factors=(1.0,) * 8)},
            "does not load qwen2 files with rope_freqs.weight",
        ),
        ({"architecture": "gemma2", "embedding_scale": 8.0}, "expects a sliding window and both soft caps"),
        ({"architecture": "gemma3", "attention_softcap": 9.0}, "ignores the attention's soft cap"),
        (
            {"architecture": "phi3", "rope": RopeConfig(1e4, 12, "longrope")},
            "by the context that it is given",
        ),
    ],
)
def test_what_llama_cpp_does_otherwise_is_noted(changes: dict[str, Any], note: str) -> None:
    [found] = llama_cpp_notes(replace(LLAMA, **changes))
    assert note in found


def test_usual_models_need_no_note() -> None:
    rope = replace(LLAMA.rope, frequency_factors=(1.0,) * 8)
    assert llama_cpp_notes(replace(LLAMA, rope=rope)) == []
    assert llama_cpp_notes(replace(PHI3, rope=RopeConfig(1e4, 12))) == []
