"""The registry, and checkpoints whose tensors do not fit their config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.tensor import Tensor
from nybble.errors import FormatError, UnsupportedError
from nybble.models import ARCHITECTURES, build_graph
from support.tiny_models import LLAMA, PHI3, tiny_checkpoint


def test_unknown_architecture_is_named_and_the_known_are_listed() -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.config = replace(LLAMA, architecture="mamba")
    with pytest.raises(UnsupportedError) as caught:
        build_graph(checkpoint)
    assert "'mamba'" in str(caught.value)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize("config", [LLAMA, PHI3])
def test_output_and_caches(config: ModelConfig) -> None:
    graph = build_graph(tiny_checkpoint(config))
    assert graph.output.width == config.vocab_size
    assert graph.num_layers == config.num_hidden_layers
    layers = [node.attributes["layer"] for node in graph.nodes if node.operator == "attention"]
    assert layers == [0, 1]


def test_rows_are_selected_after_the_last_attention() -> None:
    """So that a prompt does not pay for the rest of the last layer."""
    operators = [node.operator for node in build_graph(tiny_checkpoint()).nodes]
    last = len(operators) - 1 - operators[::-1].index("attention")
    assert operators.count("select_rows") == 2
    assert operators.index("select_rows") == last + 1


def test_missing_tensor_is_named() -> None:
    checkpoint = tiny_checkpoint()
    tensors = dict(checkpoint.tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    checkpoint.tensors = tensors
    with pytest.raises(FormatError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight"):
        build_graph(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 51}, "embed_tokens.weight: gives 50 features, but the config says 51"),
        ({"hidden_size": 40}, "embed_tokens.weight: gives 32 features, but the config says 40"),
        ({"num_attention_heads": 2}, "q_proj.weight: gives 32 features, but the config says 16"),
        ({"num_key_value_heads": 4}, "k_proj.weight: gives 16 features, but the config says 32"),
        ({"head_dim": 2**30}, "q_proj.weight: gives 32 features"),
        ({"rope": RopeConfig(theta=1e4, rotary_dim=10)}, "cannot rotate 10 features of a head of 8"),
        ({"intermediate_size": 2**31 - 1}, "gate_proj.weight: gives 48 features"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model.layers.2.input_layernorm.weight"),
        ({"attention_bias": True}, r"lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": False}, r"lacks the tensor lm_head.weight"),
    ],
)
def test_config_that_does_not_fit_the_tensors(change: dict[str, object], message: str) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.config = replace(LLAMA, **change)
    with pytest.raises(FormatError, match=message):
        build_graph(checkpoint)


def test_weight_that_is_no_matrix() -> None:
    checkpoint = tiny_checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    old = checkpoint.tensors[name]
    checkpoint.tensors = {**checkpoint.tensors, name: Tensor(name, (48 * 32,), old.encoding, old.data)}
    with pytest.raises(FormatError, match=rf"{name}: expected a matrix, found shape \(1536,\)"):
        build_graph(checkpoint)


def test_weights_that_nothing_uses_are_refused() -> None:
    checkpoint = tiny_checkpoint()
    extra = checkpoint.tensors["model.norm.weight"]
    for name in ("model.layers.1.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"):
        checkpoint.tensors = {**tiny_checkpoint().tensors, name: extra}
        with pytest.raises(UnsupportedError, match=f"1 tensors that .* does not use: {name}"):
            build_graph(checkpoint)
    for name in ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        checkpoint.tensors = {**tiny_checkpoint().tensors, name: extra}
        build_graph(checkpoint)
