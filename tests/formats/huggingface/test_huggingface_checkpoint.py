"""Hugging Face folders as checkpoints: which files count, what they hold, and writing them again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.devices import compile
from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.huggingface.checkpoint import read_huggingface_checkpoint
from nybble.formats.huggingface.writer import write_huggingface_folder
from nybble.formats.safetensors.writer import write_safetensors
from nybble.generate.options import GenerationOptions, recommended_options
from nybble.loading import read_checkpoint
from support.random_checkpoints import FAMILIES, LLAMA, random_checkpoint, run, tokens

EXPRESSIBLE = [case for case in FAMILIES if case not in ("llama-gguf", "llama-scales")]
TIED = replace(LLAMA, tie_word_embeddings=True)


def write(folder: Path, checkpoint: Checkpoint, **options: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_huggingface_folder(checkpoint, folder, **options)
    return folder


def edit(path: Path, **changes: object) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", random_checkpoint(LLAMA))


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_what_is_written_is_read_and_computes_the_same(case: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES[case], weights="f16", embeddings="bf16")
    path = write(tmp_path / "model", checkpoint, shard_bytes=30_000)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    found = read_checkpoint(path)
    assert (found.format, found.name, found.source) == ("safetensors", "model", path)
    assert set(found.tensors) == set(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        again = found.tensors[name]
        assert (again.name, again.shape, again.encoding) == (name, tensor.shape, tensor.encoding)
        np.testing.assert_array_equal(again.data, tensor.data)
    ids = tokens(20)
    logits = [run(compile(c, device="reference"), ids) for c in (checkpoint, found)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_load_runs_a_folder_on_the_cpu(kind: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(TIED, weights=kind, embeddings=kind)
    path = write(tmp_path / "model", checkpoint)
    ids = tokens(12)
    with nybble.load(path, precision="f32") as model:
        logits = model.logits(ids)
    expected = run(compile(checkpoint, device="reference"), ids)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind]
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == dtype


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(LLAMA)
    one, other = (write(tmp_path / name, checkpoint, shard_bytes=50_000) for name in "ab")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


# -- which files -------------------------------------------------------------------------------------


def test_a_file_a_shard_and_an_index_stand_for_their_folder(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(LLAMA)
    one = write(tmp_path / "one", checkpoint)
    several = write(tmp_path / "several", checkpoint, shard_bytes=50_000)
    shard = next(several.glob("model-00002-of-*.safetensors"))
    for path in (one / "model.safetensors", several / "model.safetensors.index.json", shard):
        found = read_checkpoint(path)
        assert set(found.tensors) == set(checkpoint.tensors)
        assert found.source == path.parent


def test_model_safetensors_counts_before_others(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"of another tool")
    assert read_huggingface_checkpoint(folder).config.num_hidden_layers == 3
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(NotFoundError, match=r"several models.*consolidated.safetensors, weights.safetensors"):
        read_huggingface_checkpoint(folder)
    (folder / "consolidated.safetensors").unlink()
    assert read_huggingface_checkpoint(folder).config.num_hidden_layers == 3


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", random_checkpoint(LLAMA), shard_bytes=50_000)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(NotFoundError, match=r"but no model.safetensors.index.json, which names all parts"):
        read_huggingface_checkpoint(folder)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedError, match=r"pickle files .* can run code .*save_pretrained"):
        read_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(NotFoundError, match=r"has config.json, but no \*.safetensors"):
        read_checkpoint(folder)


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        read_huggingface_checkpoint(tmp_path / "none" / "x.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"config.json: no such file"):
        read_checkpoint(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="is a LoRA adapter and no model"):
        read_checkpoint(folder)


def test_an_unknown_model_type_and_bad_json(folder: Path) -> None:
    edit(folder / "config.json", model_type="mamba")
    with pytest.raises(UnsupportedError, match=r"config.json: unknown model_type 'mamba'"):
        read_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "phi3"}')
    with pytest.raises(FormatError, match=r"config.json: has the key 'model_type' twice"):
        read_checkpoint(folder)


# -- what they hold ----------------------------------------------------------------------------------


def test_an_output_matrix_beside_a_tied_embedding(tmp_path: Path) -> None:
    """Files hold both; where they differ the config is wrong, as transformers decides too."""
    checkpoint = random_checkpoint(TIED)
    folder = write(tmp_path / "model", checkpoint)
    tensors = dict(read_checkpoint(folder).tensors)
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    for data, tied in ((embedding.data, True), (np.roll(embedding.data, 4), False)):
        both = {**checkpoint.tensors, "lm_head.weight": embedding.changed(name="lm_head.weight", data=data)}
        write_safetensors(both, folder / "model.safetensors")
        found = read_checkpoint(folder)
        assert found.config.tie_word_embeddings is tied
        assert ("lm_head.weight" in found.tensors) is not tied
        compile(found, device="reference")
    assert set(tensors) == set(checkpoint.tensors)
    again = write(tmp_path / "again", found)
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False


def test_buffers_of_old_files_are_left_out(folder: Path) -> None:
    tensors = dict(random_checkpoint(LLAMA).tensors)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = Tensor(name, (8,), encoding("f32"), np.zeros(32, np.uint8))
    write_safetensors(tensors, folder / "model.safetensors")
    assert name not in read_checkpoint(folder).tensors


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_gemma_3(prefix: str, tmp_path: Path) -> None:
    config = FAMILIES["gemma3"]
    checkpoint = random_checkpoint(config)
    folder = write(tmp_path / "model", checkpoint)
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]}
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = {prefix + name[len("model.") :]: tensor for name, tensor in checkpoint.tensors.items()}
    image = Tensor("x", (2,), encoding("f32"), np.zeros(8, np.uint8))
    tensors |= {"vision_tower.x": image, "multi_modal_projector.x": image}
    write_safetensors(tensors, folder / "model.safetensors")
    found = read_checkpoint(folder)
    assert found.config == config
    assert set(found.tensors) == set(checkpoint.tensors)
    compile(found, device="reference")
    again = json.loads((write(tmp_path / "again", found) / "config.json").read_text())
    assert (again["model_type"], again["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])


def test_a_dtype_that_nothing_computes_with(folder: Path) -> None:
    from support.safetensors_bytes import build, tensor

    (folder / "model.safetensors").write_bytes(build({"x": tensor("F8_E4M3", [2], 0, 2)}, b"ab"))
    with pytest.raises(UnsupportedError, match="tensor 'x' is F8_E4M3"):
        read_checkpoint(folder)


# -- tokenizer, templates, generation ----------------------------------------------------------------


def test_chat_templates_in_every_place(folder: Path) -> None:
    assert read_checkpoint(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert read_checkpoint(folder).chat_template == "of a processor"
    edit(folder / "tokenizer_config.json", chat_template="of the tokenizer", model_max_length=10**30)
    assert read_checkpoint(folder).chat_template == "of the tokenizer"
    named = [{"name": "default", "template": "first"}, {"name": "tool_use", "template": "tools"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    found = read_checkpoint(folder)
    assert (found.chat_template, found.chat_templates) == ("first", {"tool_use": "tools"})
    (folder / "chat_template.jinja").write_text("of its file: ☃\n", "utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    found = read_checkpoint(folder)
    assert found.chat_template == "of its file: ☃\n"
    assert found.chat_templates == {"tool_use": "tools", "rag": "documents"}
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default"}])
    with pytest.raises(FormatError, match=r"tokenizer_config.json: chat_template must be text, or a list"):
        read_checkpoint(folder)


def test_generation_config(folder: Path, tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 9.0, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(values))
    found = read_checkpoint(folder)
    assert found.metadata["huggingface.generation_config"] == values
    assert recommended_options(found.metadata) == GenerationOptions(temperature=0.6, top_k=20)
    again = write(tmp_path / "again", found)
    assert json.loads((again / "generation_config.json").read_text()) == values


def test_recommendations_for_sampling_count_only_where_the_model_samples() -> None:
    values = {"do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.2}
    options = recommended_options({"huggingface.generation_config": values})
    assert options == GenerationOptions(repetition_penalty=1.2)


# -- what cannot be written --------------------------------------------------------------------------


def test_ggml_encodings_are_refused(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(LLAMA, weights="q4_0")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight: is q4_0, which .* choose f32"):
        write(tmp_path / "model", checkpoint)
    assert not list((tmp_path / "model").iterdir())
    with pytest.raises(ValueError, match="GGUF's form"):
        write(tmp_path / "model", random_checkpoint(FAMILIES["llama-gguf"]))
