"""Which steps come out of the families' graphs, and how many buffers they need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.config import ModelConfig
from nybble.devices import cpu
from nybble.devices.base import BatchItem
from nybble.devices.cpu.fuse import OUTPUT, Fuser
from nybble.devices.cpu.steps import AttentionStep, LinearStep, Step
from nybble.errors import UnsupportedError
from nybble.graph.graph import GraphBuilder
from nybble.models import build_graph
from support.random_checkpoints import FAMILIES, LLAMA, LONGROPE, random_checkpoint, tokens


def steps_of(config: ModelConfig) -> list[Step]:
    checkpoint = random_checkpoint(config)
    return Fuser(build_graph(checkpoint), checkpoint.tensors).run()


def kind(step: Step) -> str:
    """A step in short: its operator, what is fused into it, and * where it runs for asked rows only."""
    name = type(step).__name__.removesuffix("Step").lower()
    if isinstance(step, LinearStep):
        parts = len(step.parts)
        name = (
            "norm+" * (step.norm is not None)
            + f"linear x{parts}"
            + f"+{step.gated}" * (step.gated is not None)
        )
        name += "+bias" * any(part.bias is not None for part in step.parts)
        name += "+add" * any(part.residual is not None for part in step.parts)
    elif isinstance(step, AttentionStep):
        name = "norms+" * (step.q_norm is not None and step.k_norm is not None)
        name += "rotary+" * (step.rope is not None) + "attention"
    elif hasattr(step, "kind"):
        name = step.kind
    return name + "*" * step.selected


BLOCK = ["norm+linear x3", "rotary+attention", "linear x1+add", "norm+linear x2+silu", "linear x1+add"]
LAST = ["select*", "select*", "linear x1+add*", "norm+linear x2+silu*", "linear x1+add*", "norm+linear x1*"]


def test_llama() -> None:
    steps = [kind(step) for step in steps_of(replace(LLAMA, num_hidden_layers=2))]
    assert steps == ["embedding", *BLOCK, *BLOCK[:2], *LAST]


def test_phi3_without_copies_of_its_halves() -> None:
    steps = steps_of(replace(FAMILIES["phi3"], num_hidden_layers=1))
    assert [kind(step) for step in steps] == [
        "embedding", "norm+linear x1", "rotary+attention", *LAST,
    ]  # fmt: skip
    attention, gated = steps[2], steps[6]
    assert isinstance(attention, AttentionStep) and isinstance(gated, LinearStep)
    assert [place.offset for place in (attention.q, attention.k, attention.v)] == [0, 64, 96]
    assert attention.q.storage == attention.k.storage == attention.v.storage
    # gate are the first rows of the matrix, up the others
    assert [(part.weight, part.row, part.rows) for part in gated.parts] == [
        ("model.layers.0.mlp.gate_up_proj.weight", 0, 96), ("model.layers.0.mlp.gate_up_proj.weight", 96, 96),
    ]  # fmt: skip


def test_qwen() -> None:
    steps = [kind(step) for step in steps_of(replace(FAMILIES["qwen2"], num_hidden_layers=1))]
    assert steps == ["embedding", "norm+linear x3+bias", "rotary+attention", *LAST]
    steps = [kind(step) for step in steps_of(replace(FAMILIES["qwen3"], num_hidden_layers=1))]
    assert steps == ["embedding", "norm+linear x3", "norms+rotary+attention", *LAST]


@pytest.mark.parametrize(("family", "first", "end"), [("gemma2", "", ["softcap*"]), ("gemma3", "norms+", [])])
def test_gemma(family: str, first: str, end: list[str]) -> None:
    steps = [
        kind(step)
        for step in steps_of(replace(FAMILIES[family], num_hidden_layers=1, layer_types=("full_attention",)))
    ]
    assert steps == [
        "embedding", "norm+linear x3", first + "rotary+attention", "select*", "linear x1*", "norm*",
        "select*", "add*", "norm+linear x2+gelu_pytorch_tanh*", "linear x1*", "norm*", "add*",
        "norm+linear x1*", *end,
    ]  # fmt: skip


def test_layers_without_rotary_and_scaled_residuals() -> None:
    attentions = [s for s in steps_of(FAMILIES["smollm3"]) if isinstance(s, AttentionStep)]
    assert [step.rope is not None for step in attentions] == [True, False, True]
    steps = [kind(step) for step in steps_of(replace(FAMILIES["llama-scales"], num_hidden_layers=1))]
    assert [s for s in steps if s in ("scale*", "add*")] == ["scale*", "add*"] * 2 + ["scale*"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_written_where_the_caller_wants_them(family: str) -> None:
    steps = steps_of(FAMILIES[family])
    writers = [step for step in steps if any(place.storage == OUTPUT for place in step.writes())]
    assert isinstance(writers[0], LinearStep) and writers[0] is not steps[0]
    assert writers == steps[-len(writers) :] and all(step.selected for step in writers)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3"])
def test_buffers_do_not_grow_with_layers(family: str) -> None:
    """The widths of one block, whatever the number of layers."""
    config, bytes_by_layers = FAMILIES[family], []
    for layers in (2, 6):
        kinds = ("sliding_attention", "full_attention") * (layers // 2) if config.layer_types else ()
        changed = replace(config, num_hidden_layers=layers, layer_types=kinds)
        session = cpu.compile_session(random_checkpoint(changed), max_rows=100)
        bytes_by_layers.append(session.native.buffer_bytes)
    assert bytes_by_layers[0] == bytes_by_layers[1]
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    # The residual stream, q k v (or the MLP's inside), and three values of hidden_size.
    widest = 4 * config.hidden_size + query + 2 * key + config.intermediate_size
    assert 0 < bytes_by_layers[0] <= widest * 100 * 4


def test_max_rows() -> None:
    checkpoint, ids = random_checkpoint(LLAMA), tokens(100)
    results = []
    for rows in (1, 3, 64, 100, 512):
        session = cpu.compile_session(checkpoint, precision="f32", max_rows=rows)
        assert session.native.max_rows == rows
        results.append(session.forward([BatchItem(session.new_sequence(), ids)]))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fused_is_refused() -> None:
    checkpoint = random_checkpoint(LLAMA)
    builder = GraphBuilder(checkpoint.tensors)
    x = builder.embedding("model.embed_tokens.weight")
    q = builder.rotary(x, head_dim=16, rope=LLAMA.rope)
    k = builder.rotary(x, head_dim=16, rope=LONGROPE)
    graph = builder.finish(builder.select_rows(builder.attention(q, k, x, layer=0, head_dim=16, scale=1.0)))
    with pytest.raises(UnsupportedError, match="rotates q and k of an attention alike"):
        Fuser(graph, checkpoint.tensors).run()
    builder = GraphBuilder(checkpoint.tensors)
    x = builder.rotary(builder.embedding("model.embed_tokens.weight"), head_dim=16, rope=LLAMA.rope)
    graph = builder.finish(builder.select_rows(x))
    with pytest.raises(UnsupportedError, match="rotates only values that go into one attention"):
        Fuser(graph, checkpoint.tensors).run()
