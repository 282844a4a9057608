"""A float32 Phi-3 with LongRoPE from onnxruntime-genai's model builder, against transformers.

Needs torch, transformers and onnxruntime-genai.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime_genai")
torch = pytest.importorskip("torch")

from devices.onnxruntime.conftest import start  # noqa: E402
from nybble.devices.base import BatchItem  # noqa: E402
from support.make_onnx_fixtures import build  # noqa: E402


@pytest.mark.slow
@pytest.mark.oracle
def test_logits_on_both_sides_of_the_switch(tmp_path):
    model = build("phi3-longrope-fp32-cpu", tmp_path / "folder")
    session = start(tmp_path / "folder")
    ids = np.random.default_rng(0).integers(3, 95, 40).tolist()
    for length in (16, 17, 40):
        with torch.no_grad():
            expected = model(torch.tensor([ids[:length]]), use_cache=False).logits[0].numpy()
        sequence = session.new_sequence()
        session.forward([BatchItem(sequence, ids[:7], "none")])
        for token in ids[7 : length - 1]:
            session.forward([BatchItem(sequence, [token], "none")])
        found = session.forward([BatchItem(sequence, ids[length - 1 : length], "last")])
        np.testing.assert_allclose(found[-1], expected[-1], atol=1e-3 * np.abs(expected).max())
