"""llama.cpp runs what quantize_blocks makes: a small model with its matrices in each type.

Needs an interpreter that has llama_cpp: ``LLAMA_PYTHON`` names it, else this one is tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nybble.quantize.blocks import BLOCK_TYPES
from support import random_checkpoints
from support.conversions import logits, model_file

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "support" / "llama_cpp_logits.py"


@pytest.fixture(scope="session")
def llama_python() -> str:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no llama_cpp; set LLAMA_PYTHON to an interpreter that has it")
    return python


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path, llama_python: str) -> None:
    path = model_file(tmp_path / "model.gguf", weights=name)
    ids = ",".join(map(str, random_checkpoints.tokens(12)))
    done = subprocess.run(
        [llama_python, str(SCRIPT), str(path), "128", "0", ids],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = np.array(json.loads(done.stdout)["logits"], np.float32), logits(path)
    assert np.isfinite(theirs).all() and ours.std() > 0
    # Its activations are rounded to 8 bits, ours are not.
    assert random_checkpoints.relative_error(theirs, ours) < 0.05
