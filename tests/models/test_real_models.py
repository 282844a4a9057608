"""Real GGUF files through the reference device against transformers, which reads them too.

Needs torch, transformers and the ``gguf`` package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
import transformers

from nybble.devices.base import BatchItem
from nybble.devices.reference import compile_session
from nybble.formats.gguf.checkpoint import read_gguf_checkpoint

pytestmark = [pytest.mark.oracle, pytest.mark.real_model, pytest.mark.slow]


@torch.no_grad()
def compare(path: Path, ids: list[int]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    expected = model(torch.tensor([ids])).logits[0].numpy()
    session = compile_session(read_gguf_checkpoint(path))
    sequence = session.new_sequence()
    half = len(ids) // 2
    logits = np.concatenate(
        [session.forward([BatchItem(sequence, part, "all")]) for part in (ids[:half], ids[half:])]
    )
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_smollm2(smollm2_path: Path) -> None:
    compare(smollm2_path, [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 6267, 314])


def test_gemma3(gemma3_path: Path) -> None:
    compare(gemma3_path, [2, 818, 5279, 529, 7001, 563, 9079, 236761, 108, 818, 5279, 529])


def test_phi3_made_from_smollm2_gives_smollm2s_logits(smollm2_path: Path, tmp_path: Path) -> None:
    from support.phi3_from_smollm2 import make_phi3

    phi3_path = tmp_path / "phi3.gguf"
    make_phi3(smollm2_path, phi3_path, sliding_window=2047)
    ids = [504, 3575, 282, 4649, 314, 7042, 30, 378]
    sessions = [compile_session(read_gguf_checkpoint(path)) for path in (smollm2_path, phi3_path)]
    smollm2, phi3 = (s.forward([BatchItem(s.new_sequence(), ids, "all")]) for s in sessions)
    assert np.abs(smollm2 - phi3).max() < 1e-5 * np.abs(smollm2).max()
