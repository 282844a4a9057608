"""A GGUF file as a checkpoint: tensors are views, templates and tokenizer are found."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from nybble.errors import FormatError, NotFoundError, UnsupportedError
from nybble.formats.gguf.checkpoint import read_gguf_checkpoint
from nybble.text.tokenizer import GGUFTokenizerSource


def write(path: Path, architecture: str = "qwen2", **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    for add, value in (
        (writer.add_context_length, 32),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    for key, text in keys.items():
        writer.add_key_value(key.replace("__", "."), text, gguf.GGUFValueType.STRING)
    for name in ("token_embd", "blk.0.attn_q"):
        writer.add_tensor(f"{name}.weight", np.arange(64, dtype=np.float32).reshape(8, 8))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_file_becomes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tiny.gguf",
        tokenizer__chat_template="{{ messages }}",
        tokenizer__chat_template__tool_use="{{ tools }}",
        tokenizer__ggml__model="gpt2",
    )
    checkpoint = read_gguf_checkpoint(path)
    assert (checkpoint.name, checkpoint.format, checkpoint.source) == ("Tiny", "gguf", path)
    assert checkpoint.config.architecture == "qwen2"
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.chat_templates == {"tool_use": "{{ tools }}"}
    assert isinstance(checkpoint.tokenizer, GGUFTokenizerSource)
    assert checkpoint.metadata["general.name"] == "Tiny"
    weight = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert weight.shape == (8, 8)
    assert not weight.data.flags.owndata
    assert not weight.data.flags.writeable
    assert checkpoint.nbytes == 2 * 256 + 32


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    checkpoint = read_gguf_checkpoint(write(tmp_path / "tiny.gguf"))
    assert checkpoint.tokenizer is None
    assert checkpoint.chat_template is None


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"absent.gguf"):
        read_gguf_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(UnsupportedError, match=r"tiny.gguf: unknown model architecture 'mamba'"):
        read_gguf_checkpoint(write(tmp_path / "tiny.gguf", "mamba"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03")
    with pytest.raises(FormatError, match=r"broken.gguf"):
        read_gguf_checkpoint(broken)
