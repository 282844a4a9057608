"""GGUF files of every family, as llama.cpp's converter writes them, against transformers.

Needs torch, transformers and the ``gguf`` package.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("transformers")

from nybble.devices.base import BatchItem
from nybble.devices.reference import compile_session
from nybble.formats.gguf.checkpoint import read_gguf_checkpoint
from support.gguf_models import write_gguf
from support.model_cases import CASES
from support.random_models import assert_close, check_all_ways, oracle, random_model, tokens

pytestmark = pytest.mark.oracle

LONG = {
    "rope.scaling.original_context_length": 16,
    "rope.scaling.attn_factor": math.sqrt(1 + math.log(128 / 16) / math.log(16)),
}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
GEMMA2 = {
    "attention.sliding_window": 6,
    "attention.scale": 20**-0.5,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
KEYS: dict[str, dict[str, object]] = {
    "llama": {"rope.dimension_count": 16},
    "llama-grouped-tied": {},
    "llama-biases": {},
    "llama-head-dim": {"rope.dimension_count": 24},
    "llama-theta": {"rope.freq_base": 500.0},
    "llama-linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
    "llama-llama3": {},
    "llama-yarn": YARN,
    "mistral-window": {"attention.sliding_window": 7},
    "smollm3": {"rope.freq_base": 2e6},
    "qwen2": {},
    "qwen3": {},
    "qwen3-bias": {},
    "phi3-mini-4k": {"attention.sliding_window": 11},
    "phi3-medium": {"attention.sliding_window": 15},
    "phi3-longrope": LONG,
    "phi3-longrope-window": {**LONG, "attention.sliding_window": 6},
    "phi3-longrope-factor": {**LONG, "rope.scaling.attn_factor": 1.4},
    "phi4-mini": {**LONG, "rope.dimension_count": 12, "attention.sliding_window": 262144},
    "gemma2": GEMMA2,
    "gemma2-caps": {
        **GEMMA2,
        "attention.scale": 1 / 16,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "gemma3": {
        "attention.sliding_window": 6,
        "attention.scale": 20**-0.5,
        "rope.freq_base": 1e6,
    },
    "gemma3-pattern": {
        "attention.sliding_window": 6,
        "attention.scale": 1 / 16,
        "attention.sliding_window_pattern": 2,
        "final_logit_softcapping": 3.0,
    },
    "gemma3-linear": {
        "attention.sliding_window": 6,
        "attention.scale": 1 / 16,
        "attention.sliding_window_pattern": [True, True, False],
        "rope.freq_base_swa": 500.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    },
}
"""The architecture's own keys; the cases are those of ``support/model_cases.py``."""


@pytest.mark.parametrize("case", KEYS)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model_type, switches = CASES[case]
    model = random_model(model_type, **switches)
    write_gguf(model, tmp_path / "model.gguf", keys=KEYS[case])
    checkpoint = read_gguf_checkpoint(tmp_path / "model.gguf")
    check_all_ways(compile_session(checkpoint), model, length=24)


def test_longrope_without_its_attention_factor(tmp_path: Path) -> None:
    """The factor then follows from the lengths, as in transformers."""
    model = random_model(*CASES["phi3-longrope"][:1], **CASES["phi3-longrope"][1])
    write_gguf(model, tmp_path / "model.gguf", keys={**LONG, "rope.scaling.attn_factor": None})
    check_all_ways(compile_session(read_gguf_checkpoint(tmp_path / "model.gguf")), model, length=24)


def test_quantized_matrices(tmp_path: Path) -> None:
    """Encoded rows of permuted q and k go through the same path; the oracle gets their values."""
    model = random_model("llama", num_key_value_heads=2)
    encoding = gguf.GGMLQuantizationType.Q8_0
    write_gguf(model, tmp_path / "model.gguf", encoding=encoding)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            encoded = gguf.quantize(parameter.data.numpy(), encoding)
            values = gguf.dequantize(encoded, encoding)
            parameter.data.copy_(parameter.data.new_tensor(np.asarray(values)))
    session = compile_session(read_gguf_checkpoint(tmp_path / "model.gguf"))
    ids = tokens(20)
    logits = session.forward([BatchItem(session.new_sequence(), ids, "all")])
    assert_close(logits, oracle(model, ids))
