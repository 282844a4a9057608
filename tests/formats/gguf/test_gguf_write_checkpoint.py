"""Checkpoints to GGUF files: the same file again, what is described anew, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.formats.gguf.checkpoint import read_gguf_checkpoint
from nybble.formats.gguf.general_keys import file_type, sampling_keys, size_label
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.gguf.reader import GGUFFile
from nybble.formats.gguf.write_checkpoint import gguf_metadata, gguf_tensors, write_gguf
from nybble.text.tokenizer import GGUFTokenizerSource

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
    rope=RopeConfig(10000.0, 16, interleaved=True),
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
VOCABULARY: dict[str, object] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b"],
    "tokenizer.ggml.scores": [0.0] * 8,
    "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1], np.int32),
    "tokenizer.ggml.bos_token_id": 1,
}


def weights(config: ModelConfig, kind: str = "f16") -> dict[str, Tensor]:
    """Random tensors of a model, matrices in the encoding ``kind``, in an order that no file has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for i in reversed(range(config.num_hidden_layers)):
        layer = {
            "mlp.down_proj": (hidden, inner),
            "mlp.up_proj": (inner, hidden),
            "mlp.gate_proj": (inner, hidden),
            "self_attn.o_proj": (hidden, width),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.q_proj": (width, hidden),
            "post_attention_layernorm": (hidden,),
            "input_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    result = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        row = encoding(kind if len(shape) == 2 else "f32")
        values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        assert row.quantize is not None
        result[name] = Tensor(name, shape, row, row.quantize(values))
    return result


def checkpoint(config: ModelConfig = LLAMA, kind: str = "f16", **changes: object) -> Checkpoint:
    made = Checkpoint(
        config=config,
        tensors=weights(config, kind),
        tokenizer=GGUFTokenizerSource(VOCABULARY),
        chat_template="{{ messages }}",
        chat_templates={"tool_use": "{{ tools }}"},
        format="safetensors",
        name="Tiny",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    source = checkpoint(metadata={"huggingface.generation_config": {"temperature": 0.5, "top_k": 7}})
    seen: list[tuple[int, int]] = []
    [path] = write_gguf(source, tmp_path / "tiny.gguf", progress=lambda *at: seen.append(at))
    assert seen[-1] == (source.nbytes, source.nbytes)
    found = read_gguf_checkpoint(path)
    assert found.config == replace(LLAMA, rms_norm_eps=float(np.float32(1e-5)))
    assert (found.name, found.chat_template) == ("Tiny", "{{ messages }}")
    assert found.chat_templates == {"tool_use": "{{ tools }}"}
    assert {name: t.data.tobytes() for name, t in found.tensors.items()} == {
        name: t.data.tobytes() for name, t in source.tensors.items()
    }
    assert found.tokenizer is not None and source.tokenizer is not None
    assert found.tokenizer.build().encode("a b") == source.tokenizer.build().encode("a b")
    metadata = found.metadata
    assert isinstance(metadata, GGUFMetadata)
    assert metadata["general.file_type"] == 1
    assert "general.quantization_version" not in metadata
    assert metadata["general.size_label"] == "19K"
    assert metadata["general.sampling.top_k"] == 7
    assert metadata.types["general.sampling.top_k"] == "int32"
    assert metadata.types["tokenizer.ggml.scores"] == "array[float32]"
    assert not any(key.startswith("huggingface") for key in metadata)
    with GGUFFile.open(path) as file:
        names = list(file.tensors)
    assert names[:3] == ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"]
    assert names[-2:] == ["blk.1.ffn_down.weight", "output_norm.weight"]


def test_the_same_file_again_and_through_parts(tmp_path: Path) -> None:
    [path] = write_gguf(checkpoint(kind="q4_0"), tmp_path / "a.gguf")
    first = read_gguf_checkpoint(path)
    [again] = write_gguf(first, tmp_path / "b.gguf")
    assert again.read_bytes() == path.read_bytes()
    parts = write_gguf(first, tmp_path / "c.gguf", split_bytes=3000)
    assert len(parts) > 2
    [joined] = write_gguf(read_gguf_checkpoint(parts[1]), tmp_path / "d.gguf")
    assert joined.read_bytes() == path.read_bytes()


@pytest.mark.real_model
@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_real_files_come_back_byte_for_byte(
    tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(model)
    [path] = write_gguf(read_gguf_checkpoint(source), tmp_path / "again.gguf")
    assert path.stat().st_size == source.stat().st_size
    with path.open("rb") as ours, source.open("rb") as theirs:
        while True:
            piece = theirs.read(1 << 24)
            assert ours.read(1 << 24) == piece
            if not piece:
                break


@pytest.mark.real_model
@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_keys_made_from_the_config_say_what_the_real_file_says(
    model: str, request: pytest.FixtureRequest
) -> None:
    found = read_gguf_checkpoint(request.getfixturevalue(model))
    tensors = gguf_tensors(found)
    made = gguf_metadata(replace(found, metadata={}, format="safetensors"), tensors)
    assert set(made) >= {key for key in found.metadata if not key.startswith("general.")}
    for key, value in made.items():
        if key in found.metadata and not isinstance(value, np.ndarray):
            theirs = found.metadata[key]
            if isinstance(value, float) and isinstance(theirs, float):
                assert math.isclose(value, theirs, rel_tol=1e-6), key
            elif key not in ("general.file_type", "general.size_label"):
                assert value == theirs, key


def kept(metadata: Mapping[str, object], source: Checkpoint | None = None, **changes: object) -> GGUFMetadata:
    """The keys that are written for a GGUF source with these."""
    made = replace(source or checkpoint(), format="gguf", metadata=metadata, **changes)  # type: ignore[arg-type]
    return gguf_metadata(made, gguf_tensors(made))


def source_metadata(kind: str = "f16", **more: object) -> dict[str, object]:
    made = checkpoint(kind=kind)
    values = dict(gguf_metadata(made, gguf_tensors(made)))
    return {"general.author": "me", **values, "custom.note": np.float64(0.1), **more}


def test_metadata_of_a_gguf_source_is_kept_in_order() -> None:
    metadata = source_metadata()
    types = {"general.author": "string", "llama.context_length": "uint64"}
    result = kept(GGUFMetadata({**metadata, "split.count": 3, "onnx.x": {}}, types))
    assert list(result) == list(metadata)
    assert result.types["llama.context_length"] == "uint64"
    assert all(result[key] is metadata[key] for key in metadata)


def test_keys_that_are_no_longer_true_are_replaced_where_they_were() -> None:
    metadata = source_metadata()
    typed = GGUFMetadata(metadata, dict.fromkeys(metadata, "wrong") | {"general.author": "string"})
    longer = replace(LLAMA, max_position_embeddings=512)
    result = kept(typed, config=longer)
    assert result["llama.context_length"] == 512
    assert "llama.context_length" not in result.types
    assert result["general.author"] == "me"
    assert list(result).index("llama.context_length") < list(result).index("custom.note")
    assert list(result) == list(metadata)


def test_another_architecture_takes_the_old_ones_keys_away() -> None:
    metadata = source_metadata()
    old = {key.replace("llama.", "qwen2."): value for key, value in metadata.items()}
    result = kept(old | {"general.architecture": "qwen2"})
    assert result["general.architecture"] == "llama"
    assert not any(key.startswith("qwen2.") for key in result)


def test_file_type_is_kept_unless_the_tensors_refute_it() -> None:
    assert kept(source_metadata())["general.file_type"] == 1
    requantized = kept(source_metadata(), checkpoint(kind="q8_0"))
    assert requantized["general.file_type"] == 7
    assert requantized["general.quantization_version"] == 2
    widened = kept(source_metadata("q8_0"), checkpoint(kind="f32"))
    assert widened["general.file_type"] == 0
    assert "general.quantization_version" not in widened


def test_templates_and_tokenizer_of_the_checkpoint_win() -> None:
    result = kept(source_metadata(), chat_template="new", chat_templates={})
    assert result["tokenizer.chat_template"] == "new"
    assert not {"tokenizer.chat_template.tool_use", "tokenizer.chat_templates"} & set(result)
    other = {**VOCABULARY, "tokenizer.ggml.eos_token_id": 2}
    result = kept(source_metadata(), tokenizer=GGUFTokenizerSource(other))
    assert result["tokenizer.ggml.eos_token_id"] == 2
    assert result["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("name", ["phi3-from-smollm2", "My-Phi-3"])
def test_a_name_that_llama_cpp_would_take_for_phi3s_vocabulary(name: str) -> None:
    def written(*more: str) -> object:
        tokens = [*VOCABULARY["tokenizer.ggml.tokens"], *more]  # type: ignore[misc]
        source = GGUFTokenizerSource({**VOCABULARY, "tokenizer.ggml.tokens": tokens})
        made = checkpoint(name=name, tokenizer=source)
        return gguf_metadata(made, gguf_tensors(made))["general.name"]

    assert written() == {"phi3-from-smollm2": "phi 3-from-smollm2", "My-Phi-3": "My-Phi 3"}[name]
    assert written("<|endoftext|>") == name


def changed(name: str, kind: str, source: Checkpoint | None = None) -> Checkpoint:
    source = source or checkpoint()
    tensor = source.tensors[name]
    row = encoding(kind)
    data = np.zeros(row.nbytes(math.prod(tensor.shape)), np.uint8)
    return replace(source, tensors={**source.tensors, name: tensor.changed(encoding=row, data=data)})


def test_what_the_converter_must_do_before_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"model.layers.1.input_layernorm.weight: is f16, but llama.cpp needs"
    ):
        gguf_tensors(changed("model.layers.1.input_layernorm.weight", "f16"))
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.up_proj.weight: GGUF does not have the encoding int4_g32_f16"
    ):
        gguf_tensors(changed("model.layers.0.mlp.up_proj.weight", "int4_g32_f16"))
    with pytest.raises(ValueError, match="not in GGUF form"):
        gguf_tensors(checkpoint(replace(LLAMA, rope=RopeConfig(10000.0, 16))))
    permutation = "model.layers.0.mlp.up_proj.input_permutation"
    extra = Tensor(permutation, (1, 32), encoding("i32"), np.zeros(128, np.uint8))
    source = checkpoint()
    with pytest.raises(UnsupportedError, match=r"GGUF has no name for the tensor .*input_permutation"):
        gguf_tensors(replace(source, tensors={**source.tensors, permutation: extra}))


def test_an_output_matrix_that_is_the_embedding_is_left_out() -> None:
    source = checkpoint()
    head = source.tensors["model.embed_tokens.weight"].changed(name="lm_head.weight")
    both = replace(source, tensors={**source.tensors, "lm_head.weight": head})
    assert "output.weight" not in [tensor.name for tensor in gguf_tensors(both)]
    untied = replace(both, config=replace(LLAMA, tie_word_embeddings=False))
    assert gguf_tensors(untied)[-1].name == "output.weight"


def test_rotary_divisors_come_first(tmp_path: Path) -> None:
    rope = replace(LLAMA.rope, frequency_factors=(1.0, 1.5) * 4)
    [path] = write_gguf(checkpoint(replace(LLAMA, rope=rope)), tmp_path / "a.gguf")
    with GGUFFile.open(path) as file:
        assert next(iter(file.tensors)) == "rope_freqs.weight"
    assert read_gguf_checkpoint(path).config.rope == rope


@pytest.mark.parametrize(
    ("kinds", "number"),
    [
        ({"f32": 1}, 0),
        ({"bf16": 9, "q8_0": 1}, 32),
        ({"q4_k": 9, "q5_0": 1}, 14),
        ({"q4_k": 9, "q6_k": 1}, 15),
        ({"q5_k": 9, "q6_k": 1}, 17),
        ({"q3_k": 9, "q4_k": 1}, 12),
        ({"q6_k": 1}, 18),
        ({"iq4_xs": 1}, 30),
        ({"i8": 1}, None),
    ],
)
def test_file_types(kinds: dict[str, int], number: int | None) -> None:
    tensors = [
        Tensor(f"blk.{i}.x.weight", (count, 256), encoding(kind), np.empty(0, np.uint8))
        for i, (kind, count) in enumerate(kinds.items())
    ]
    # The embedding does not vote.
    embedding = Tensor("token_embd.weight", (99, 256), encoding("q8_0"), np.empty(0, np.uint8))
    assert file_type([*tensors, embedding]) == number


@pytest.mark.parametrize(
    ("count", "label"),
    [(999, "999"), (134_515_008, "135M"), (1_100_000_000, "1.1B"), (9_960_000_000, "10B"), (999_600, "1M")],
)
def test_size_labels(count: int, label: str) -> None:
    assert size_label([Tensor("a", (count,), encoding("i8"), np.empty(0, np.uint8))]) == label


def test_sampling_advice() -> None:
    assert sampling_keys({"temperature": 1, "top_k": 20.0, "top_p": True, "max_length": 5}) == {
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 20,
    }
    assert sampling_keys({"temperature": 1, "do_sample": False}) == {}
    assert sampling_keys(None) == {}
