"""Folders that nybble writes, run by ONNX Runtime, give the reference device's logits at every step."""

from __future__ import annotations

import numpy as np
import pytest

from devices.onnxruntime.conftest import start
from nybble.checkpoint.forms import to_onnx_form
from nybble.devices.base import BatchItem
from nybble.devices.reference import compile_session as reference
from nybble.formats.onnx.write import write_onnx_folder
from support.random_checkpoints import FAMILIES, LONGROPE, random_checkpoint, tokens

NAMES = ("llama", "phi3-longrope", "phi3-longrope-window", "qwen2", "mistral-window")
SWITCH = LONGROPE.original_max_position_embeddings


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-portable"])
@pytest.mark.parametrize("name", NAMES)
def test_written_folders(tmp_path, name, target):
    checkpoint = random_checkpoint(FAMILIES[name])
    write_onnx_folder(to_onnx_form(checkpoint), tmp_path / "model", target=target)
    session, expected = start(tmp_path / "model"), reference(checkpoint)
    assert session._io.shares_buffers == (target == "onnx-cpu-fp32")
    assert session.context_length == checkpoint.config.max_position_embeddings
    if "longrope" in name:
        assert session._io.switch.length == SWITCH
    ids = tokens(60)
    one, other = session.new_sequence(), expected.new_sequence()
    for begin, end in ((0, 17), (17, 18), (18, 39), (39, 40), (40, 41), (41, 60)):
        found = session.forward([BatchItem(one, ids[begin:end], "all")])
        wanted = expected.forward([BatchItem(other, ids[begin:end], "all")])
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
