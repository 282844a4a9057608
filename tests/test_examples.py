"""Every example runs on the default model and prints what it promises."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each one prints, somewhere. A new example needs a row.
EXPECTED = {
    "generate.py": ["red"],
    "chat.py": ["> And of Italy?", "Paris", "Rome", "prompt tokens were cached"],
    "choices.py": ["0: ", "2: "],
    "next_token.py": ["' Paris'"],
    "quantize.py": ["q4_k_m: ", "KL divergence 0.0"],
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == EXPECTED.keys()


@pytest.mark.real_model
@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, smollm2_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, str(smollm2_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    for text in EXPECTED[name]:
        assert text in output
