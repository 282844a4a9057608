"""Errors of weights, between formats and encodings, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.evaluate import weights
from nybble.evaluate.weights import parameters, stored_bytes, weight_errors
from nybble.loading import read_checkpoint
from nybble.models import build_graph
from nybble.quantize.folding import fold, plan_folding
from support.affine_models import permutation_tensor
from support.random_checkpoints import FAMILIES, LLAMA, random_checkpoint, with_tensors


def test_the_same_weights_in_three_formats(folder: Path) -> None:
    models = [read_checkpoint(folder / name) for name in ("f32.gguf", "safetensors", "onnx")]
    assert models[0].config.rope.interleaved and not models[1].config.rope.interleaved
    for other in models[1:]:
        errors, notes = weight_errors(models[0], other)
        assert len(errors) == 2 + 1 + 2 * 9
        assert {error.relative_error for error in errors} == {0.0}
        assert notes == []


def test_the_error_is_that_of_the_values(folder: Path) -> None:
    one, two = read_checkpoint(folder / "safetensors"), read_checkpoint(folder / "q4_0.gguf")
    errors, notes = weight_errors(one, two)
    assert notes == []
    by_name = {error.name: error for error in errors}
    name = "model.layers.1.mlp.down_proj.weight"
    x = one.tensors[name].dequantize().astype(np.float64)
    y = two.tensors[name].dequantize().astype(np.float64)
    found = by_name[name]
    assert found.relative_error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert (found.layer, found.kind) == (1, "mlp.down_proj")
    assert (found.encoding, found.reference_encoding) == ("q4_0", "f32")
    # Rows of q lie in another order there: their error is no larger for it.
    assert by_name["model.layers.1.self_attn.q_proj.weight"].relative_error < 0.15
    assert by_name["model.embed_tokens.weight"].layer is None


def test_rows_are_read_a_few_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = read_checkpoint(folder / "safetensors"), read_checkpoint(folder / "q4_0.gguf")
    whole, _ = weight_errors(one, two)
    monkeypatch.setattr(weights, "_ELEMENTS", 3 * 256)
    cut, _ = weight_errors(one, two)
    assert [e.relative_error for e in cut] == pytest.approx([e.relative_error for e in whole])


def fused(seed: int = 0):  # type: ignore[no-untyped-def]
    """A llama whose q, k, v and gate, up are fused as Phi-3's are."""
    checkpoint = random_checkpoint(LLAMA, seed)
    tensors = dict(checkpoint.tensors)
    for layer in range(LLAMA.num_hidden_layers):
        for whole, parts in weights.FUSED.items():
            names = [f"model.layers.{layer}.{part}.weight" for part in parts]
            data = np.concatenate([tensors[name].data for name in names])
            rows = sum(tensors[name].shape[0] for name in names)
            columns = tensors.pop(names[0]).shape[1]
            for name in names[1:]:
                tensors.pop(name)
            joined = f"model.layers.{layer}.{whole}.weight"
            tensors[joined] = Tensor(joined, (rows, columns), encoding("f32"), data)
    return replace(checkpoint, tensors=tensors)


def test_fused_matrices_against_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_ELEMENTS", 50 * 64)  # pieces that end inside a part
    for one, two in ((fused(), random_checkpoint(LLAMA)), (random_checkpoint(LLAMA), fused())):
        errors, notes = weight_errors(one, two)
        assert notes == []
        assert {error.relative_error for error in errors} == {0.0}
        kinds = {error.kind for error in errors if error.layer is not None}
        assert {"self_attn.qkv_proj", "mlp.gate_up_proj"} <= kinds and "self_attn.q_proj" not in kinds
    errors, _ = weight_errors(fused(1), random_checkpoint(LLAMA))
    assert next(e for e in errors if e.kind == "self_attn.qkv_proj").relative_error > 0.9


def test_columns_that_are_sorted_by_group() -> None:
    checkpoint = random_checkpoint(LLAMA)
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]
    order = permutation_tensor(name.replace("weight", "input_permutation"), tensor.shape[1])
    values = tensor.dequantize()[:, order.data.view("<i4")]
    changed = Tensor(
        name, tensor.shape, tensor.encoding, np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    )
    errors, notes = weight_errors(checkpoint, with_tensors(checkpoint, {name: changed, order.name: order}))
    assert notes == [] and {error.relative_error for error in errors} == {0.0}


def test_scales_that_were_moved_are_noted() -> None:
    checkpoint = random_checkpoint(LLAMA)
    name = "model.layers.0.input_layernorm.weight"
    doubled = (checkpoint.tensors[name].dequantize() * 2).view(np.uint8)
    changed = checkpoint.tensors[name].changed(data=doubled)
    _, notes = weight_errors(checkpoint, with_tensors(checkpoint, {name: changed}))
    assert len(notes) == 1 and "norm weights differ" in notes[0]


def test_scales_that_were_moved_are_no_errors() -> None:
    """A model scaled as AWQ does and rounded has the errors of the rounding, not those of the scales."""
    checkpoint = random_checkpoint(LLAMA)
    random = np.random.default_rng(0)
    tensors = dict(checkpoint.tensors)
    for group in plan_folding(build_graph(checkpoint)).groups:
        tensors |= fold(group, random.lognormal(0, 1, group.scales).astype(np.float32), tensors)
    scaled = with_tensors(checkpoint, tensors)
    errors, notes = weight_errors(checkpoint, scaled)
    assert "norm weights differ" in notes[0]
    assert max(error.relative_error for error in errors) < 1e-3
    assert {error.kind for error in errors if "layernorm" in error.kind} == set()
    name = "model.layers.1.mlp.up_proj.weight"
    values = tensors[name].dequantize()
    noise = 1 + 0.1 * random.standard_normal(values.shape)
    noisy = np.ascontiguousarray(values * noise, np.float32).reshape(-1).view(np.uint8)
    errors, _ = weight_errors(
        checkpoint, with_tensors(checkpoint, {**tensors, name: tensors[name].changed(data=noisy)})
    )
    assert {error.name: error.relative_error for error in errors}[name] == pytest.approx(0.1, rel=0.1)


def test_what_cannot_be_compared_is_noted() -> None:
    narrow = random_checkpoint(replace(LLAMA, intermediate_size=64))
    errors, notes = weight_errors(random_checkpoint(LLAMA), narrow)
    assert "mlp.down_proj" not in {error.kind for error in errors}
    assert notes[0].startswith("not in both, or of another shape: ") and "and 6 more" in notes[0]


def test_norms_with_an_offset() -> None:
    """Gemma's norm weights are stored as w or 1 + w: that is no difference."""
    config = FAMILIES["gemma3"]
    checkpoint = random_checkpoint(config)
    from nybble.checkpoint.forms import to_gguf_form

    errors, notes = weight_errors(checkpoint, to_gguf_form(checkpoint))
    assert notes == [] and max(error.relative_error for error in errors) < 1e-6


def test_sizes(folder: Path) -> None:
    models = {
        name: read_checkpoint(folder / name) for name in ("f32.gguf", "safetensors", "onnx", "q8_0.gguf")
    }
    assert len({parameters(model) for model in models.values()}) == 1
    stored = {name: stored_bytes(folder / name, model) for name, model in models.items()}
    exact = 4 * parameters(models["f32.gguf"])
    assert stored["f32.gguf"] == exact
    assert exact < stored["safetensors"] == (folder / "safetensors" / "model.safetensors").stat().st_size
    assert exact < stored["onnx"] < exact * 1.1
    assert stored["q8_0.gguf"] / exact == pytest.approx(8.5 / 32, rel=0.01)


def test_a_tied_output_matrix_counts_once() -> None:
    tied = random_checkpoint(replace(LLAMA, tie_word_embeddings=True))
    extra = random_checkpoint(LLAMA).tensors["lm_head.weight"]
    assert parameters(with_tensors(tied, {"lm_head.weight": extra})) == parameters(tied)
