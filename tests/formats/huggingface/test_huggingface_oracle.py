"""Hugging Face folders against transformers: read what it writes, and it reads what we write.

Needs torch and transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
import transformers

import nybble
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import to_huggingface_form
from nybble.checkpoint.tensor import Tensor
from nybble.devices.base import BatchItem
from nybble.devices.cpu import compile_session
from nybble.formats.huggingface.checkpoint import read_huggingface_checkpoint
from nybble.formats.huggingface.config import FAMILIES, read_config
from nybble.formats.huggingface.writer import write_huggingface_folder
from nybble.loading import read_checkpoint
from support.model_cases import CASES
from support.random_models import assert_close, oracle, random_model, tokens

pytestmark = pytest.mark.oracle


def from_pretrained(folder: Path) -> torch.nn.Module:
    """transformers' model of a folder, in float32; every weight must be there and none too many."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_folders_of_transformers_and_folders_for_it(case: str, tmp_path: Path) -> None:
    model_type, switches = CASES[case]
    model = random_model(model_type, **switches)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = read_huggingface_checkpoint(tmp_path / "theirs")
    ids = tokens(40)
    expected = oracle(model, ids)
    session = compile_session(checkpoint, precision="f32", threads=1)
    assert_close(session.forward([BatchItem(session.new_sequence(), ids, "all")]), expected)

    # With the original config.json, and with one made from nothing but the ModelConfig.
    for name, written in (("kept", checkpoint), ("made", replace(checkpoint, metadata={}))):
        folder = tmp_path / name
        folder.mkdir()
        write_huggingface_folder(written, folder, shard_bytes=60_000)
        again = from_pretrained(folder)
        np.testing.assert_array_equal(oracle(again, ids), expected)
        state = again.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), key


LEAN = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("model_type", "switches"),
    [
        *((model_type, {}) for model_type in FAMILIES),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"use_sliding_window": True}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
        ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS}}),
        ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 2048}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 7.0}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ],
)
def test_defaults_are_those_of_transformers(model_type: str, switches: dict[str, Any]) -> None:
    """Files leave keys out; older ones most of them."""
    raw = {**LEAN, **switches, "model_type": model_type}
    complete = transformers.AutoConfig.for_model(**raw).to_dict()
    assert read_config(raw) == read_config(complete)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    random_model("qwen3", head_dim=24, tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path)
    checkpoint = read_huggingface_checkpoint(tmp_path)
    ids = tokens(30)
    session = compile_session(checkpoint, precision="f32", threads=1)
    found = session.forward([BatchItem(session.new_sequence(), ids, "all")])
    assert_close(found, oracle(from_pretrained(tmp_path), ids))


@torch.no_grad()
def test_both_settle_a_tied_model_that_stores_two_matrices_alike(tmp_path: Path) -> None:
    model = random_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    ids = tokens(10)
    session = compile_session(read_checkpoint(tmp_path), precision="f32", threads=1)
    found = session.forward([BatchItem(session.new_sequence(), ids, "all")])
    assert_close(found, oracle(from_pretrained(tmp_path), ids))
    assert_close(found, oracle(model, ids))


@pytest.mark.real_model
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_from_gguf_in_transformers(smollm2_path: Path, tmp_path: Path) -> None:
    """A real model, tokenizer and template included: same ids, same logits, same greedy text."""
    f16 = encoding("f16")
    assert f16.quantize is not None

    def half(tensor: Tensor) -> Tensor:
        return tensor.changed(encoding=f16, data=lambda: f16.quantize(tensor.dequantize().reshape(-1)))

    checkpoint = to_huggingface_form(read_checkpoint(smollm2_path))
    checkpoint = replace(checkpoint, tensors={k: half(v) for k, v in checkpoint.tensors.items()})
    write_huggingface_folder(checkpoint, tmp_path, shard_bytes=1e8)
    model = from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with nybble.load(tmp_path, precision="f32") as ours:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        reply = ours.chat(messages, temperature=0, max_tokens=16)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.encode(text, add_special=False) == ids
        assert_close(ours.logits(ids), oracle(model, ids))
        # generation_config.json was written too; the sampling it asks for is switched off.
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0, len(ids) :]
        assert tokenizer.decode(output, skip_special_tokens=True) == reply.text
