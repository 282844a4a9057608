"""Sums of squares against llama.cpp's own, taken as llama-imatrix takes them.

Needs an interpreter that has llama_cpp: ``LLAMA_PYTHON`` names it, else this one is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nybble.formats.gguf.names import gguf_name
from nybble.loading import read_checkpoint
from nybble.quantize.calibrate import calibration_windows
from nybble.quantize.layer_runner import LayerRunner

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.real_model]

SCRIPT = Path(__file__).parents[1] / "support" / "llama_cpp_imatrix.py"


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_sums_are_those_of_llama_cpp(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no llama_cpp; set LLAMA_PYTHON to an interpreter that has it")
    path: Path = request.getfixturevalue(model)
    checkpoint = read_checkpoint(path)
    assert checkpoint.tokenizer is not None
    windows = calibration_windows(checkpoint, checkpoint.tokenizer.build(), windows=2, window=256)
    np.save(tmp_path / "windows.npy", np.stack(windows))
    command = [python, str(SCRIPT), str(path), str(tmp_path / "windows.npy"), str(tmp_path / "sums.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = np.load(tmp_path / "sums.npz")
    errors: dict[str, float] = {}
    with LayerRunner(checkpoint, windows) as runner:
        for layer in range(runner.num_layers + 1):
            found = runner.collect(layer, hessian=False, advance=layer < runner.num_layers)
            for name, seen in found.items():
                wanted = expected[gguf_name(checkpoint.config.architecture, name)]
                errors[name] = float(np.linalg.norm(seen.sum_squares - wanted) / np.linalg.norm(wanted))
    assert len(errors) == len(expected.files)
    # Both round activations, llama.cpp to int8 blocks: half a percent at each linear.
    assert max(errors.values()) < 0.05, max(errors, key=lambda name: errors[name])
    assert np.mean(list(errors.values())) < 0.01
