"""Folding of scales: what the plan finds in every family, and that the function stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.forms import to_gguf_form
from nybble.devices.reference import compile_session
from nybble.models import build_graph
from nybble.quantize.folding import NormBefore, RowsBefore, fold, plan_folding
from support.affine_models import affine_checkpoint
from support.random_checkpoints import FAMILIES, LLAMA, random_checkpoint, relative_error, run, tokens


def scaled(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """Every group scaled by random factors between about 1/20 and 20."""
    random = np.random.default_rng(seed)
    tensors = dict(checkpoint.tensors)
    for group in plan_folding(build_graph(checkpoint)).groups:
        scales = np.exp(random.normal(size=group.scales)).astype(np.float32)
        changed = fold(group, scales, tensors)
        assert changed
        tensors |= changed
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    ids = tokens(24)
    expected = run(compile_session(checkpoint), ids)
    changed = scaled(checkpoint)
    assert relative_error(run(compile_session(changed), ids), expected) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_layers_is_scaled(family: str) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    plan = plan_folding(build_graph(checkpoint))
    linears = {name for name in checkpoint.tensors if name.endswith("_proj.weight")}
    found = [name for group in plan.groups for name in group.linears]
    assert len(set(found)) == len(found)
    if checkpoint.config.tie_word_embeddings:
        assert set(found) == linears
        assert plan.unscaled == {"model.embed_tokens.weight": "model.embed_tokens.weight is used in 2 places"}
    else:
        assert set(found) == linears | {"lm_head.weight"}
        assert not plan.unscaled


def test_a_layer_of_llama_with_grouped_queries() -> None:
    config = replace(LLAMA, num_hidden_layers=1, num_key_value_heads=2, attention_bias=True)
    groups = plan_folding(build_graph(random_checkpoint(config))).groups
    attention, output, mlp, down = groups[:4]
    prefix = "model.layers.0."
    assert attention.linears == tuple(f"{prefix}self_attn.{n}_proj.weight" for n in "qkv")
    assert attention.before == NormBefore(f"{prefix}input_layernorm.weight", 0.0)
    assert output.linears == (f"{prefix}self_attn.o_proj.weight",)
    name = f"{prefix}self_attn.v_proj"
    assert output.before == RowsBefore(f"{name}.weight", f"{name}.bias", 0, 32)
    assert output.scales == 32
    np.testing.assert_array_equal(output.source, np.r_[0:16, 0:16, 16:32, 16:32])
    assert mlp.linears == (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
    assert down.before == RowsBefore(f"{prefix}mlp.up_proj.weight", None, 0, 96)


def test_fused_projections_are_scaled_in_part() -> None:
    config = replace(FAMILIES["phi3"], num_key_value_heads=2)
    groups = plan_folding(build_graph(random_checkpoint(config))).groups
    size, query = config.intermediate_size, config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    prefix = "model.layers.0."
    assert groups[1].before == RowsBefore(
        f"{prefix}self_attn.qkv_proj.weight", None, query + key, query + 2 * key
    )
    assert groups[3].before == RowsBefore(f"{prefix}mlp.gate_up_proj.weight", None, size, 2 * size)


def test_norms_with_an_offset_in_either_form() -> None:
    checkpoint = random_checkpoint(FAMILIES["gemma3"])
    for form, offset in ((checkpoint, 1.0), (to_gguf_form(checkpoint), 0.0)):
        group = plan_folding(build_graph(form)).groups[0]
        assert isinstance(group.before, NormBefore)
        assert group.before.offset == offset
        before = form.tensors[group.before.weight].dequantize()
        scales = np.full(group.scales, 2, np.float32)
        after = fold(group, scales, form.tensors)[group.before.weight].dequantize()
        np.testing.assert_allclose(after + np.float32(offset), (before + np.float32(offset)) / 2, rtol=1e-6)


def test_permuted_inputs_are_left_alone() -> None:
    from nybble.checkpoint.encodings.affine import AffineFormat

    checkpoint = affine_checkpoint(AffineFormat(4, 32, "f16", True), act_order=True)
    plan = plan_folding(build_graph(checkpoint))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert plan.unscaled[name] == "its input is made by gather_columns"


def test_refusals() -> None:
    checkpoint = random_checkpoint(LLAMA)
    group = plan_folding(build_graph(checkpoint)).groups[0]
    with pytest.raises(ValueError, match=r"\(3,\) scales for model.layers.0.self_attn.q_proj.weight"):
        fold(group, np.ones(3, np.float32), checkpoint.tensors)
    for wrong in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="finite and above 0"):
            fold(group, np.full(group.scales, wrong, np.float32), checkpoint.tensors)
