"""Folders that nybble writes, run by ONNX Runtime, give the reference device's logits at every step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from devices.onnxruntime.conftest import start
from nybble.checkpoint.forms import to_onnx_form
from nybble.devices.base import BatchItem
from nybble.devices.onnxruntime import cache
from nybble.devices.reference import compile_session as reference
from nybble.formats.onnx.targets import TARGETS
from nybble.formats.onnx.write import write_onnx_folder
from support.random_checkpoints import FAMILIES, LONGROPE, random_checkpoint, tokens

NAMES = ("llama", "phi3-longrope", "phi3-longrope-window", "qwen2", "mistral-window")
WINDOWED = replace(TARGETS["onnx-cpu-fp32"], windowed_cache=True)
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


@pytest.mark.parametrize("step", [1, 4, 256])
@pytest.mark.parametrize("name", ["mistral-window", "phi3-longrope-window"])
def test_windows_that_are_dropped(tmp_path, monkeypatch, name, step):
    """Sequences that go back behind their window, and forks of them, run again what is gone."""
    monkeypatch.setattr(cache, "STEP", step)
    checkpoint = random_checkpoint(FAMILIES[name])
    write_onnx_folder(to_onnx_form(checkpoint), tmp_path / "model", target=WINDOWED)
    session, expected = start(tmp_path / "model"), reference(checkpoint)
    assert any(port.window for port in session._io.caches)
    ids = tokens(40)
    pairs = [(session.new_sequence(), expected.new_sequence())]

    def check(at: int, new: list[int]) -> None:
        found, wanted = (
            device.forward([BatchItem(sequence, new, "all")])
            for device, sequence in zip((session, expected), pairs[at], strict=True)
        )
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())

    check(0, ids[:25])
    pairs.append((pairs[0][0].fork(), pairs[0][1].fork()))
    check(1, ids[25:28])
    for sequence in pairs[0]:
        sequence.truncate(11)
    check(0, ids[3:6])
    check(1, ids[28:29])
    for sequence in pairs[1]:
        sequence.truncate(3)
    check(1, ids[:1])
    check(1, ids[5:20])
    check(0, ids[:2])


def test_a_run_that_failed_does_not_leave_a_half_window(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "STEP", 1)
    checkpoint = random_checkpoint(FAMILIES["mistral-window"])
    write_onnx_folder(to_onnx_form(checkpoint), tmp_path / "model", target=WINDOWED)
    session, expected = start(tmp_path / "model"), reference(checkpoint)
    monkeypatch.setattr("nybble.devices.onnxruntime.session.MAX_ROWS", 4)
    sequence, other = session.new_sequence(), expected.new_sequence()
    session.forward([BatchItem(sequence, tokens(20), "none")])
    run, left = session.decoder.run, [2]

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the second piece fails")
        return run(*arguments, **options)

    monkeypatch.setattr(session.decoder, "run", failing)
    with pytest.raises(RuntimeError):
        session.forward([BatchItem(sequence, tokens(12), "none")])
    monkeypatch.setattr(session.decoder, "run", run)
    assert sequence.length == 20
    found = session.forward([BatchItem(sequence, [5], "last")])
    wanted = expected.forward([BatchItem(other, [*tokens(20), 5], "last")])
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
