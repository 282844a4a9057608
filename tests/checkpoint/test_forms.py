"""Forms of a checkpoint: the model computes the same in each, and the way back gives the same bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import (
    INTERLEAVED_IN_GGUF,
    NORM_OFFSETS,
    ROPE_FREQS,
    in_form,
    row_order,
    to_gguf_form,
    to_huggingface_form,
    to_onnx_form,
)
from nybble.checkpoint.llama3_factors import llama3_divisors, with_llama3_parameters
from nybble.checkpoint.tensor import Tensor
from nybble.devices.reference import compile_session
from nybble.errors import UnsupportedError
from nybble.formats.gguf.config import ARCHITECTURES
from nybble.formats.huggingface.config import read_config
from support import random_checkpoints

LLAMA3 = random_checkpoints.rope(
    16, kind="llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0
)
MODELS = {
    **{name: config for name, config in random_checkpoints.FAMILIES.items() if name != "llama-gguf"},
    "llama-llama3": replace(random_checkpoints.LLAMA, rope=LLAMA3),
    "llama-partial": replace(random_checkpoints.LLAMA, rope=random_checkpoints.rope(16, rotary_dim=12)),
    "smollm3-norms": replace(random_checkpoints.FAMILIES["smollm3"], query_key_norm=True),
}
FORMS = (to_huggingface_form, to_gguf_form, to_onnx_form)


def logits(checkpoint: Checkpoint) -> np.ndarray:
    return random_checkpoints.run(compile_session(checkpoint), random_checkpoints.tokens(20))


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_computes_the_same(name: str, weights: str) -> None:
    config = MODELS[name]
    if weights != "f32" and config.head_dim * config.num_attention_heads % 32:
        pytest.skip("rows of no whole blocks")
    checkpoint = random_checkpoints.random_checkpoint(config, weights=weights)
    expected = logits(checkpoint)
    for to_form in FORMS:
        changed = to_form(checkpoint)
        for there in FORMS:
            assert random_checkpoints.largest_difference(logits(there(changed)), expected) < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_gives_the_same_bytes(name: str) -> None:
    checkpoint = random_checkpoints.random_checkpoint(MODELS[name])
    for away in (to_gguf_form, to_onnx_form):
        back = to_huggingface_form(away(checkpoint))
        assert back.config == to_huggingface_form(checkpoint).config
        assert list(back.tensors) == list(checkpoint.tensors)
        for key, tensor in checkpoint.tensors.items():
            if not (key.endswith("norm.weight") and checkpoint.config.rms_norm_offset):
                assert np.array_equal(back.tensors[key].data, tensor.data), key


def test_rows_are_those_of_the_converter_of_llama_cpp() -> None:
    """``LlamaModel.permute``: (heads, 2, head_dim / 2) to (heads, head_dim / 2, 2)."""
    rows = np.arange(48).reshape(3, 2, 8).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(row_order(48, 16, 16, interleaved=True), rows)
    back = row_order(48, 16, 16, interleaved=False)
    assert np.array_equal(rows[back], np.arange(48))


def test_only_the_rotated_part_of_a_head_moves() -> None:
    assert row_order(8, 8, 4, interleaved=True).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert row_order(16, 8, 4, interleaved=False).tolist()[8:] == [8, 10, 9, 11, 12, 13, 14, 15]


def test_what_moves() -> None:
    checkpoint = random_checkpoints.random_checkpoint(MODELS["llama-biases"])
    changed, changes = in_form(checkpoint, "gguf")
    assert {name.split(".", 3)[-1] for name in changes} == {
        f"self_attn.{part}_proj.{kind}" for part in "qk" for kind in ("weight", "bias")
    }
    assert all(change.exact and change.what == "rows permuted" for change in changes.values())
    moved = changed.tensors["model.layers.0.self_attn.k_proj.bias"].data
    before = checkpoint.tensors["model.layers.0.self_attn.k_proj.bias"].data
    assert np.array_equal(moved.view("<f4"), before.view("<f4").reshape(2, 2, 8).swapaxes(1, 2).reshape(-1))
    assert changed.config.rope.interleaved


def test_blocks_are_not_rounded() -> None:
    checkpoint = random_checkpoints.random_checkpoint(MODELS["llama"], weights="q4_0")
    name = "model.layers.1.self_attn.q_proj.weight"
    moved = to_gguf_form(checkpoint).tensors[name]
    assert moved.encoding.name == "q4_0" and not moved.is_view
    before = {row.tobytes() for row in checkpoint.tensors[name].data.reshape(64, -1)}
    assert {row.tobytes() for row in moved.data.reshape(64, -1)} == before


def test_a_vector_of_blocks_cannot_be_permuted() -> None:
    checkpoint = random_checkpoints.random_checkpoint(MODELS["llama-biases"])
    name = "model.layers.0.self_attn.q_proj.bias"
    row = encoding("q8_0")
    assert row.quantize is not None
    broken = Tensor(name, (64,), row, row.quantize(np.zeros(64, np.float32)))
    with pytest.raises(UnsupportedError, match="cannot be moved"):
        to_gguf_form(random_checkpoints.with_tensors(checkpoint, {name: broken}))


def test_gguf_architectures_agree() -> None:
    assert {name for name, row in ARCHITECTURES.items() if row.permuted} == INTERLEAVED_IN_GGUF


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text"])
def test_offsets_are_those_of_huggingface(model_type: str) -> None:
    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99,
        "num_hidden_layers": 2, "max_position_embeddings": 64, "head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    config = read_config({"model_type": model_type, **sizes})
    assert NORM_OFFSETS.get(config.architecture, 0.0) == config.rms_norm_offset


# -- norms ---------------------------------------------------------------------------------------------


def gemma_with_norm(values: list[float], offset: float) -> Checkpoint:
    config = replace(MODELS["gemma2"], rms_norm_offset=offset)
    checkpoint = random_checkpoints.random_checkpoint(config)
    data = np.resize(np.array(values, "<f4"), 64).view(np.uint8)
    tensor = Tensor("model.norm.weight", (64,), encoding("f32"), data)
    return random_checkpoints.with_tensors(checkpoint, {"model.norm.weight": tensor})


def test_a_norm_that_float32_holds_with_and_without_its_offset_is_exact() -> None:
    changed, changes = in_form(gemma_with_norm([1.5, 0.25, 30.0, -2.0], 0.0), "huggingface")
    assert changed.tensors["model.norm.weight"].dequantize()[:4].tolist() == [0.5, -0.75, 29.0, -3.0]
    assert changes["model.norm.weight"].exact
    assert changes["model.norm.weight"].what == "1 subtracted"


def test_a_norm_that_loses_bits_says_how_much() -> None:
    tiny = 2.0**-30
    _, changes = in_form(gemma_with_norm([1.5, tiny], 0.0), "huggingface")
    change = changes["model.norm.weight"]
    assert not change.exact and change.max_error == tiny


def test_adding_the_offset_is_what_the_model_does_anyway() -> None:
    """transformers computes 1 + weight in float32 too, so the used value never changes."""
    _, changes = in_form(gemma_with_norm([1e-9, 0.3, -1.7], 1.0), "gguf")
    assert changes["model.norm.weight"].exact


# -- Llama 3's scaling ---------------------------------------------------------------------------------


def real_rope(factor: float, context: int = 8192) -> RopeConfig:
    return RopeConfig(
        theta=500000.0,
        rotary_dim=128,
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=context,
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_parameters_of_llama_3_are_found(factor: float) -> None:
    rope = real_rope(factor)
    divisors = llama3_divisors(rope)
    assert divisors[0] == 1.0 and divisors[-1] == factor
    found = with_llama3_parameters(
        replace(
            rope, kind="default", factor=1.0, original_max_position_embeddings=None,
            frequency_factors=divisors,
        )
    )  # fmt: skip
    assert found == rope


def test_divisors_of_another_tool_survive_bit_for_bit() -> None:
    """Written in float32 they may differ in the last bit; the way back gives the file's own."""
    rope = replace(random_checkpoints.LLAMA.rope, interleaved=True, frequency_factors=llama3_divisors(LLAMA3))
    nudged = np.nextafter(np.asarray(rope.frequency_factors, "<f4"), np.float32(9)).tolist()
    config = replace(random_checkpoints.LLAMA, rope=replace(rope, frequency_factors=tuple(nudged)))
    checkpoint = random_checkpoints.random_checkpoint(config)
    away = to_huggingface_form(checkpoint)
    assert away.config.rope.kind == "llama3" and away.config.rope.frequency_factors == ()
    assert away.metadata[ROPE_FREQS] == nudged
    assert to_gguf_form(away).config == config


def test_other_divisors_do_not_fit_in_a_config_json() -> None:
    rope = replace(random_checkpoints.LLAMA.rope, frequency_factors=(1.0, 3.0, 2.0, 4.0, 1.0, 1.0, 1.0, 9.0))
    checkpoint = random_checkpoints.random_checkpoint(replace(random_checkpoints.LLAMA, rope=rope))
    with pytest.raises(UnsupportedError, match="Llama 3"):
        to_huggingface_form(checkpoint)
    assert to_onnx_form(checkpoint).config.rope == rope
    assert to_gguf_form(checkpoint).config.rope.frequency_factors == rope.frequency_factors


# -- names ---------------------------------------------------------------------------------------------


def test_mistral_is_llama_in_gguf_and_comes_back_with_its_window() -> None:
    checkpoint = random_checkpoints.random_checkpoint(MODELS["mistral-window"])
    there = to_gguf_form(checkpoint)
    assert there.config.architecture == "llama"
    assert to_huggingface_form(there).config == checkpoint.config


def test_a_window_with_biases_has_no_name_in_transformers() -> None:
    config = replace(MODELS["llama-biases"], **random_checkpoints.WINDOW)
    with pytest.raises(UnsupportedError, match="window and biases"):
        to_huggingface_form(random_checkpoints.random_checkpoint(config))


def test_a_tied_output_matrix_is_left_out() -> None:
    checkpoint = random_checkpoints.random_checkpoint(
        replace(random_checkpoints.LLAMA, tie_word_embeddings=True)
    )
    head = checkpoint.tensors["model.embed_tokens.weight"].changed(name="lm_head.weight")
    checkpoint = random_checkpoints.with_tensors(checkpoint, {"lm_head.weight": head})
    changed, changes = in_form(checkpoint, "gguf")
    assert "lm_head.weight" not in changed.tensors and "lm_head.weight" in changes


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_as_transformers_reads_it(smollm2_path) -> None:  # type: ignore[no-untyped-def]
    """Its own loader undoes the permutation too: every value is the same."""
    transformers = pytest.importorskip("transformers")
    from nybble.formats.gguf.checkpoint import read_gguf_checkpoint

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(smollm2_path.parent), gguf_file=smollm2_path.name, dtype="float32"
    )
    changed = to_huggingface_form(read_gguf_checkpoint(smollm2_path))
    state = model.state_dict()
    for name, tensor in changed.tensors.items():
        assert np.array_equal(tensor.dequantize(), state[name].numpy()), name
