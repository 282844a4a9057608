"""GGUF metadata and tensor names to a config: defaults of old files, and hostile values."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, NybbleError, UnsupportedError
from nybble.formats.gguf.checkpoint import CanonicalTensors
from nybble.formats.gguf.config import ARCHITECTURES, read_config
from nybble.formats.gguf.names import LAYER_NAMES, canonical_name, gguf_name
from nybble.graph import rotary_frequencies
from nybble.models import ARCHITECTURES as FAMILIES

LLAMA: dict[str, object] = {
    "context_length": 2048,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def tensor(name: str, *shape: int, value: float = 1.0) -> Tensor:
    values = np.full(shape, value, np.float32)
    return Tensor(name, shape, encoding("f32"), values.reshape(-1).view(np.uint8))


def config(architecture: str = "llama", *more: Tensor, **changes: object) -> ModelConfig:
    """The config of a file with these keys (underscores for dots; None takes a key away)."""
    keys = {**LLAMA, **{key.replace("__", "."): value for key, value in changes.items()}}
    layers = keys["block_count"]
    names = [
        f"blk.{i}.attn_norm.weight" for i in range(layers if isinstance(layers, int) and layers < 99 else 2)
    ]
    tensors = [tensor("token_embd.weight", 10, 64), *(tensor(name, 64) for name in names), *more]
    metadata = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    metadata["general.architecture"] = architecture
    return read_config(metadata, {t.name: t for t in tensors}, "model.gguf")


def test_tables_name_the_same_architectures() -> None:
    assert set(ARCHITECTURES) == set(LAYER_NAMES) == set(FAMILIES)


def test_defaults_of_llama() -> None:
    result = config(attention__head_count_kv=None)
    assert result.num_key_value_heads == 4
    assert result.head_dim == result.rope.rotary_dim == 16
    assert result.rope.theta == 10000.0
    assert result.rope.interleaved
    assert result.vocab_size == 10
    assert result.tie_word_embeddings
    assert not config("llama", tensor("output.weight", 10, 64)).tie_word_embeddings


def test_values_may_be_numpy_or_repeated_for_each_layer() -> None:
    result = config(attention__head_count=np.array([4, 4], np.uint32), rope__freq_base=np.float32(500.0))
    assert result.num_attention_heads == 4
    assert result.rope.theta == 500.0
    with pytest.raises(UnsupportedError, match=r"llama.attention.head_count differs between layers"):
        config(attention__head_count=np.array([4, 2], np.uint32))


@pytest.mark.parametrize("layers", [32, 40])
def test_old_phi3_4k_files_have_the_window_that_they_do_not_name(layers: int) -> None:
    old = config("phi3", context_length=4096, block_count=layers)
    assert {old.layer_window(layer) for layer in range(layers)} == {2047}
    new = config("phi3", context_length=4096, block_count=layers, attention__sliding_window=100)
    assert new.layer_window(0) == 100
    off = config("phi3", context_length=4096, block_count=layers, attention__sliding_window=0)
    assert off.layer_window(0) is None


def test_other_phi3_files_without_the_key_have_no_window() -> None:
    assert config("phi3", context_length=4096, block_count=8).layer_window(0) is None
    assert config("phi3", context_length=131072, block_count=32).layer_window(0) is None


def test_phi3_is_not_permuted_and_longrope_comes_from_tensors() -> None:
    short, long = (
        tensor("rope_factors_short.weight", 8, value=1.5),
        tensor("rope_factors_long.weight", 8, value=4.0),
    )
    keys = {"context_length": 131072, "rope__scaling__original_context_length": 4096}
    rope = config("phi3", short, long, **keys).rope
    assert not rope.interleaved
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("longrope", 32.0, 4096)
    assert rope.short_factor == (1.5,) * 8
    assert rope.long_factor == (4.0,) * 8
    with pytest.raises(FormatError, match=r"rope_factors_short.weight, which is missing"):
        config("phi3", long, **keys)
    with pytest.raises(FormatError, match=r"rope_factors_long.weight: has shape \(7,\)"):
        config("phi3", short, tensor("rope_factors_long.weight", 7), **keys)
    with pytest.raises(FormatError, match="not finite and above 0"):
        config("phi3", short, tensor("rope_factors_long.weight", 8, value=0.0), **keys)


def test_a_factor_without_a_type_is_linear_and_longrope_needs_its_tensors() -> None:
    for key in ("rope__scaling__factor", "rope__scale_linear"):
        rope = config(**{key: 4.0}).rope
        assert (rope.kind, rope.factor) == ("linear", 4.0)
    keys = {"rope__scaling__type": "longrope", "rope__scaling__original_context_length": 512}
    with pytest.raises(FormatError, match=r"needs the tensor rope_factors_short.weight, which is missing"):
        config(**keys)


def test_smollm3_leaves_every_fourth_layer_without_rotary() -> None:
    result = config("smollm3", block_count=8)
    assert [result.layer_rope(layer) is None for layer in range(8)] == [False, False, False, True] * 2


def test_gemma_patterns_and_scales() -> None:
    gemma2 = config("gemma2", block_count=4)
    assert [gemma2.layer_window(layer) for layer in range(4)] == [4096, None, 4096, None]
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert gemma2.embedding_scale == 8.0
    assert gemma2.rms_norm_offset == 0.0
    gemma3 = config("gemma3", block_count=7, attention__sliding_window=512)
    assert [gemma3.layer_window(layer) for layer in range(7)] == [512] * 5 + [None, 512]
    full, sliding = gemma3.layer_rope(5), gemma3.layer_rope(0)
    assert full is not None and full.theta == 1e6
    assert sliding is not None and sliding.theta == 10000.0
    assert gemma3.attention_scale is None
    # The 27B models scale by hidden_size / heads instead of head_dim.
    sizes = {"attention__key_length": 32, "attention__value_length": 32}
    assert config("gemma2", block_count=46, **sizes).attention_scale == 16**-0.5
    assert config("gemma3", block_count=62, **sizes).attention_scale == 16**-0.5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", None, "llama.block_count is missing"),
        ("block_count", 0, "llama.block_count is 0"),
        ("block_count", 2**32 - 1, "llama.block_count is 4294967295; 1 to 4096"),
        ("block_count", 100, "llama.block_count is 100, but the file has tensors of another number"),
        ("block_count", 2.0, "llama.block_count must be a whole number, found 2.0"),
        ("block_count", True, "llama.block_count must be a whole number"),
        ("block_count", "2", "llama.block_count must be a whole number"),
        ("embedding_length", 0, "llama.embedding_length is 0"),
        ("embedding_length", 2**63, "llama.embedding_length is 9223372036854775808"),
        ("embedding_length", 66, "llama.attention.head_count is 4, which does not divide 66"),
        ("feed_forward_length", -1, "llama.feed_forward_length is -1"),
        ("context_length", 0, "llama.context_length is 0"),
        ("attention.head_count", 0, "llama.attention.head_count is 0"),
        ("attention.head_count", 65, "llama.attention.head_count is 65; 1 to 64"),
        ("attention.head_count", [], "llama.attention.head_count must be a whole number"),
        ("attention.head_count_kv", 0, "llama.attention.head_count_kv is 0"),
        ("attention.head_count_kv", 5, "llama.attention.head_count_kv is 5; 1 to 4"),
        ("attention.key_length", 2**31, "llama.attention.key_length is 2147483648"),
        ("attention.sliding_window", -5, "llama.attention.sliding_window is -5"),
        ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is missing"),
        ("attention.layer_norm_rms_epsilon", math.nan, "layer_norm_rms_epsilon is nan"),
        ("attention.layer_norm_rms_epsilon", -1e-5, "layer_norm_rms_epsilon is -1e-05"),
        ("attention.layer_norm_rms_epsilon", "x" * 999, "must be a number, found 'xxx"),
        ("rope.dimension_count", 17, "llama.rope.dimension_count is 17; 2 to 16"),
        ("rope.dimension_count", 15, "llama.rope.dimension_count is 15; it must be even"),
        ("rope.freq_base", 0.0, "llama.rope.freq_base is 0.0; it must be above 0"),
        ("rope.freq_base", 1e-300, "llama.rope.freq_base is 1e-300; it must be above 0"),
        ("rope.freq_base", math.inf, "llama.rope.freq_base is inf"),
        ("rope.scaling.type", 3, "llama.rope.scaling.type must be text"),
        ("rope.scaling.factor", 0.0, "llama.rope.scaling.factor is 0.0; it must be above 0"),
        ("logit_scale", 0.0, "llama.logit_scale is 0.0"),
    ],
)
def test_bad_values_are_refused_by_name(key: str, value: object, message: str) -> None:
    scaling = {"rope__scaling__type": "linear"} if key == "rope.scaling.factor" else {}
    with pytest.raises(FormatError) as caught:
        config(**scaling, **{key.replace(".", "__"): value})
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.gguf: ")
    assert len(str(caught.value)) < 300


HOSTILE = [
    *(-1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**32 - 1, 2**63, 0.0, -0.0, 1e-300, 1e300, math.nan, math.inf),
    *("", "yarn", "linear", "longrope", True, False, [], [1, 2], ["a"], [True] * 40, np.array([1, 2])),
]
KEYS = [
    *LLAMA,
    *("attention.key_length", "attention.value_length", "attention.scale", "attention.sliding_window"),
    *("attention.sliding_window_pattern", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.original_context_length", "logit_scale", "expert_count", "final_logit_softcapping"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_hostile_values_give_a_config_or_our_errors(architecture: str) -> None:
    """Nothing else gets out, and rotary constants that were let in can be used."""
    choose = random.Random(architecture)
    divisors = [tensor(f"rope_factors_{kind}.weight", 8) for kind in ("long", "short")]
    outcomes = set()
    for _ in range(500):
        changes = {choose.choice(KEYS): choose.choice(HOSTILE) for _ in range(choose.randint(1, 3))}
        more = divisors if choose.random() < 0.2 else []
        try:
            result = config(architecture, *more, **{k.replace(".", "__"): v for k, v in changes.items()})
            for layer in range(result.num_hidden_layers):
                if (rope := result.layer_rope(layer)) is not None:
                    assert np.isfinite(rotary_frequencies(rope, 5000)[0]).all()
            outcomes.add("config")
        except NybbleError as error:
            outcomes.add(type(error).__name__)
    assert {"config", "FormatError", "UnsupportedError"} <= outcomes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope__scaling__type": "spiral"}, "known: none, linear, yarn, longrope"),
        ({"attention__value_length": 8}, "attention.value_length differs from the key length 16"),
    ],
)
def test_valid_but_unsupported(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config(**changes)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"unknown model architecture 'mamba'; known: llama, .*gemma3"):
        read_config({"general.architecture": "mamba"}, {}, "model.gguf")
    with pytest.raises(FormatError, match=r"general.architecture is missing"):
        read_config({}, {}, "model.gguf")


@pytest.mark.parametrize("architecture", LAYER_NAMES)
def test_names_go_both_ways(architecture: str) -> None:
    names = [f"blk.17.{short}.{kind}" for short in LAYER_NAMES[architecture] for kind in ("weight", "bias")]
    for name in [*names, "token_embd.weight", "output_norm.weight", "output.weight"]:
        canonical = canonical_name(architecture, name)
        assert canonical is not None
        assert gguf_name(architecture, canonical) == name
    assert len({canonical_name(architecture, name) for name in names}) == len(names)


def test_tensors_get_canonical_names_and_keep_their_data() -> None:
    source = {name: tensor(name, 3) for name in ("blk.0.attn_q.weight", "rope_freqs.weight")}
    tensors = CanonicalTensors("llama", source)
    assert list(tensors) == ["model.layers.0.self_attn.q_proj.weight"]
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert weight.name == "model.layers.0.self_attn.q_proj.weight"
    assert weight.data is source["blk.0.attn_q.weight"].data


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "blk.x.attn_q.weight"]
)
def test_tensors_that_the_family_does_not_have_are_refused(name: str) -> None:
    """Running without them would give wrong answers."""
    with pytest.raises(UnsupportedError, match=name):
        canonical_name("llama", name)
    with pytest.raises(UnsupportedError, match="no name for"):
        gguf_name("llama", "model.layers.0.self_attn.qkv_proj.weight")
