"""ModelConfig to config.json and back, for every family; what a family's class cannot say is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.formats.huggingface.config import read_config
from nybble.formats.huggingface.write_config import config_json
from support.random_checkpoints import FAMILIES, LLAMA, rope

FULL, SLIDING = "full_attention", "sliding_attention"
floats = st.floats(0.25, 64.0)
fractions = st.sampled_from([1.0, 0.75, 0.7, 0.5, 0.3])


@st.composite
def scalings(draw: st.DrawFn, kinds: tuple[str, ...], rotary_dim: int, maximum: int) -> dict[str, Any] | None:
    kind = draw(st.sampled_from(("default", *kinds)))
    if kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": draw(floats)}
    if kind == "llama3":
        scaling |= {"low_freq_factor": draw(floats), "high_freq_factor": draw(floats)}
    if kind in ("llama3", "yarn", "longrope") and draw(st.booleans()):
        scaling["original_max_position_embeddings"] = draw(st.integers(1, maximum))
    if kind == "yarn":
        optional = {"beta_fast": floats, "beta_slow": floats, "mscale": floats, "mscale_all_dim": floats}
        scaling |= {key: draw(value) for key, value in optional.items() if draw(st.booleans())}
    if kind == "longrope":
        lists = st.lists(floats, min_size=rotary_dim // 2, max_size=rotary_dim // 2)
        scaling |= {"short_factor": draw(lists), "long_factor": draw(lists)}
        if draw(st.booleans()):
            del scaling["factor"]
    if kind in ("yarn", "longrope") and draw(st.booleans()):
        scaling["attention_factor"] = draw(floats)
    return scaling


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of any family, with any of its switches."""
    family = draw(
        st.sampled_from(["llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
    )
    layers, heads = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    head_dim = 2 * draw(st.integers(4, 12))
    maximum = draw(st.integers(64, 10_000))
    kinds = ("linear", "dynamic", "llama3", "yarn", "longrope")
    own_head_dim = draw(st.booleans())
    raw: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw(st.integers(1, 300_000)),
        "hidden_size": heads * head_dim * (2 if own_head_dim else 1),
        "intermediate_size": draw(st.integers(1, 999)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.integers(1, heads)),
        "max_position_embeddings": maximum,
        "rope_theta": draw(st.floats(2.0, 1e7)),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-2)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if own_head_dim or family in ("gemma2", "gemma3_text", "qwen3"):
        raw["head_dim"] = head_dim
    rotary_dim = head_dim
    window = draw(st.none() | st.integers(1, maximum))
    types = draw(st.none() | st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers, max_size=layers))
    if family in ("llama", "smollm3"):
        raw["mlp_bias"] = draw(st.booleans())
    if family in ("llama", "smollm3", "qwen3", "gemma2", "gemma3_text"):
        raw["attention_bias"] = draw(st.booleans())
    if family in ("mistral", "phi3"):
        raw["sliding_window"] = window
    elif family in ("smollm3", "qwen2", "qwen3"):
        raw |= {"use_sliding_window": window is not None, "sliding_window": window}
        raw["max_window_layers"] = draw(st.integers(0, layers + 1))
        if types is not None:
            raw["layer_types"] = types
    elif family != "llama":
        raw["sliding_window"] = window or 8
        if types is not None:
            raw["layer_types"] = types
        raw["query_pre_attn_scalar"] = draw(st.integers(1, 512))
        raw["final_logit_softcapping"] = draw(st.none() | floats)
        raw["attn_logit_softcapping"] = draw(st.none() | floats)
    if family == "smollm3" and draw(st.booleans()):
        raw["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    if family == "gemma3_text":
        raw["rope_local_base_freq"] = draw(st.floats(2.0, 1e6))
    if family.startswith("gemma"):
        raw["hidden_activation"] = draw(st.sampled_from(["gelu", "gelu_pytorch_tanh"]))
    else:
        raw["hidden_act"] = draw(st.sampled_from(["silu", "gelu"]))
    if family == "phi3":
        kinds = ("longrope",)
        raw["partial_rotary_factor"] = draw(fractions)
        rotary_dim = int(head_dim * raw["partial_rotary_factor"])
        if rotary_dim % 2:
            del raw["partial_rotary_factor"]
            rotary_dim = head_dim
    raw["rope_scaling"] = draw(scalings(kinds, rotary_dim, maximum))
    return raw


@settings(max_examples=400, deadline=None)
@given(files(), st.booleans())
def test_every_config_comes_back(raw: dict[str, Any], with_original: bool) -> None:
    config = read_config(raw)
    metadata = {"huggingface.config": {**raw, "initializer_range": 0.02}} if with_original else {}
    written = config_json(config, metadata)
    assert read_config(written) == config
    assert written["model_type"] == raw["model_type"]
    assert ("initializer_range" in written) == with_original
    # With another config than the original's the rest is kept and the mathematics is written anew.
    changed = replace(config, vocab_size=config.vocab_size + 1, rms_norm_eps=0.5)
    written = config_json(changed, metadata)
    assert read_config(written) == changed
    assert ("initializer_range" in written) == with_original


def test_an_original_that_says_the_same_is_kept_as_it_is() -> None:
    original = {
        "architectures": ["MyLlama"],
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "bos_token_id": 3,
        "eos_token_id": [1, 2],
        "auto_map": {"AutoModel": "code.Model"},
        "quantization_config": {"quant_method": "awq"},
    }
    written = config_json(read_config(original), {"huggingface.config": original})
    assert written == {k: v for k, v in original.items() if k not in ("auto_map", "quantization_config")}
    assert next(iter(written)) == "architectures"


@pytest.mark.parametrize("case", [case for case in FAMILIES if case not in ("llama-gguf", "llama-scales")])
def test_configs_of_every_family(case: str) -> None:
    config = FAMILIES[case]
    back = read_config(config_json(config))
    layers = range(config.num_hidden_layers)
    assert [back.layer_rope(i) for i in layers] == [config.layer_rope(i) for i in layers]
    assert [back.layer_window(i) for i in layers] == [config.layer_window(i) for i in layers]
    assert back.attention_scale == pytest.approx(config.attention_scale)


def test_names_and_values_of_transformers() -> None:
    longrope = FAMILIES["phi3-longrope"]
    written = config_json(replace(longrope, rope=replace(longrope.rope, factor=512 / 40)))
    assert written["architectures"] == ["Phi3ForCausalLM"]
    # transformers 4 takes exactly these three keys.
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert written["original_max_position_embeddings"] == 40
    assert "head_dim" not in written
    written = config_json(FAMILIES["gemma3"])
    assert written["model_type"] == "gemma3_text" and written["query_pre_attn_scalar"] == 20
    assert type(written["query_pre_attn_scalar"]) is int
    periodic = replace(FAMILIES["gemma3"], layer_types=(SLIDING, FULL) * 2)
    assert config_json(periodic)["sliding_window_pattern"] == 2


def test_token_ids_come_from_what_the_file_said() -> None:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    written = config_json(LLAMA)
    assert [written[key] for key in ids] == [None] * 3  # the classes' defaults belong to other models
    gguf = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 5000,  # not in the vocabulary
    }
    written = config_json(LLAMA, gguf)
    assert [written[key] for key in ids] == [1, 2, None]
    genai = {"onnx.genai_config": {"model": {"bos_token_id": 4, "eos_token_id": [5, 6], "pad_token_id": 7}}}
    written = config_json(LLAMA, genai)
    assert [written[key] for key in ids] == [4, [5, 6], 7]


def test_a_llama_of_gguf_with_a_window_is_mistral() -> None:
    config = replace(LLAMA, sliding_window=7, layer_types=(SLIDING,) * 3)
    written = config_json(config)
    assert (written["model_type"], written["sliding_window"]) == ("mistral", 7)
    assert read_config(written) == replace(config, architecture="mistral")


def test_the_scale_that_a_gguf_file_leaves_to_the_head() -> None:
    config = replace(FAMILIES["gemma2"], attention_scale=None)
    assert config_json(config)["query_pre_attn_scalar"] == config.head_dim
    # 256 ** -0.5 as float32 in a file
    assert config_json(replace(config, attention_scale=0.0624999999))["query_pre_attn_scalar"] == 256


LINEAR = rope(16, kind="linear", factor=2.0)
DYNAMIC = rope(16, kind="dynamic", factor=2.0, original_max_position_embeddings=9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FAMILIES["llama-gguf"], "GGUF's form; Hugging Face's is needed"),
        (replace(LLAMA, rope=rope(16, frequency_factors=(1.0,) * 8)), "GGUF's form"),
        (FAMILIES["llama-scales"], "cannot say this model's logit_scale, residual_scale"),
        (replace(FAMILIES["gemma2"], rms_norm_offset=0.0), "cannot say this model's rms_norm_offset"),
        (replace(LLAMA, architecture="mamba"), "no model for the architecture 'mamba'; known: llama"),
        (replace(LLAMA, query_key_norm=True), "query_key_norm"),
        (replace(LLAMA, attention_bias=True), "attention_output_bias"),
        (replace(FAMILIES["phi3"], rope=LINEAR), "no rotary scaling"),
        (replace(LLAMA, rope=rope(16, rotary_dim=8)), "rotates whole heads only"),
        (replace(FAMILIES["phi3"], attention_bias=True), "no bias on q, k and v"),
        (replace(FAMILIES["qwen3"], mlp_bias=True), "no bias in the MLP"),
        (replace(FAMILIES["phi3-window"], layer_types=(SLIDING, FULL, FULL)), "only some layers"),
        (replace(FAMILIES["gemma3"], rope_local=rope(24, kind="linear", factor=2.0)), "scaled rotary"),
        (replace(LLAMA, rope=DYNAMIC), "rope"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_json(config)


def test_part_of_a_head_in_every_size() -> None:
    for head_dim in range(8, 130, 2):
        for part in range(2, head_dim + 1, 2):
            config = replace(
                FAMILIES["phi3"], head_dim=head_dim, hidden_size=4 * head_dim, rope=RopeConfig(9.0, part)
            )
            assert read_config(config_json(config)).rope.rotary_dim == part
