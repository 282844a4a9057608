"""Perplexity and KL divergence of real models are those of llama.cpp's llama-perplexity.

Needs an interpreter that has llama_cpp: ``LLAMA_PYTHON`` names it, else this one is tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nybble.convert.convert import convert
from nybble.evaluate.compare import evaluate
from nybble.evaluate.windows import tokens_of
from nybble.loading import read_checkpoint
from support.evaluations import pages

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.real_model]

SCRIPT = Path(__file__).parents[1] / "support" / "llama_cpp_perplexity.py"
WINDOW, COUNT = 256, 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(pages(), encoding="utf-8")
    return path


def llama_perplexity(text: Path, *models: Path) -> dict[str, Any]:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no llama_cpp; set LLAMA_PYTHON to an interpreter that has it")
    command = [python, str(SCRIPT), str(text), str(WINDOW), str(COUNT), *map(str, models)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_perplexity(name: str, text: Path, request: pytest.FixtureRequest) -> None:
    """SmolLM2 takes no begin token, Gemma does."""
    path = request.getfixturevalue(f"{name}_path")
    theirs = llama_perplexity(text, path)
    ours = evaluate([path], text=text, window=WINDOW, windows=COUNT, speed=False)
    source = read_checkpoint(path).tokenizer
    assert source is not None
    tokens = tokens_of(source.build(), text.read_text(encoding="utf-8"), WINDOW * COUNT)
    assert tokens.tolist() == theirs["tokens"]
    assert ours.reference.quality is not None
    found = ours.reference.quality.perplexity
    # llama.cpp rounds activations to 8 bits, which moves the perplexity by far less than its error.
    assert abs(found.value - theirs["perplexity"][0]) < 0.2 * theirs["error"][0]
    assert found.error == pytest.approx(theirs["error"][0], rel=0.05)


def test_divergence(smollm2_path: Path, text: Path, tmp_path: Path) -> None:
    """Of MLPs made anew in 4 bits, whose divergence is far above what llama.cpp's own rounding adds."""
    small = tmp_path / "q4_0.gguf"
    convert(smollm2_path, small, to="gguf", encodings={"*.mlp.*": "q4_0"}, allow_lossy=True)
    theirs = llama_perplexity(text, smollm2_path, small)
    options = {"text": text, "window": WINDOW, "windows": COUNT, "speed": False}
    ours = evaluate([smollm2_path, small], **options).models[1].quality
    assert ours is not None and ours.kld is not None and ours.top1 is not None and ours.kld99 is not None
    assert abs(ours.kld.value - theirs["kld"]) < 3 * theirs["kld_error"] + 0.003
    assert ours.kld99.value == pytest.approx(theirs["kld99"], rel=0.15)
    assert abs(ours.top1.value - theirs["top1"]) < 0.03
