"""Recipes against llama.cpp's mixes: the same type for every matrix.

The stored choices are of two models; the others need an interpreter that has llama_cpp: ``LLAMA_PYTHON``
names it, else this one is tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.mix_models import (
    MODELS,
    STORED,
    STORED_MODELS,
    in_words,
    llama_cpp_choices,
    mixes,
    recipe_choices,
)

OURS = {"f32", "mxfp4"}
"""Recipes for GGUF that are no mix there, or not the same: its MXFP4 is for mixtures of experts."""
EXPECTED = json.loads(STORED.read_bytes())


def test_every_mix_is_stored() -> None:
    assert tuple(EXPECTED) == STORED_MODELS
    wanted = {name + ending for name in set(mixes()) - OURS for ending in ("", "+importance")}
    for model in STORED_MODELS:
        assert set(EXPECTED[model]) == wanted


@pytest.mark.parametrize("mix", EXPECTED[STORED_MODELS[0]])
@pytest.mark.parametrize("model", STORED_MODELS)
def test_recipes_choose_as_llama_cpp_did(model: str, mix: str) -> None:
    assert in_words(recipe_choices(model, mix)) == EXPECTED[model][mix]


def test_mxfp4_is_for_the_layers() -> None:
    words = in_words(recipe_choices("llama-groups-of-2", "mxfp4"))
    assert words.pop("output") == words.pop("token_embd") == "1 q8_0"
    assert set(words.values()) == {"24 mxfp4"}


@pytest.mark.oracle
@pytest.mark.slow
def test_recipes_choose_as_llama_cpp_does(tmp_path: Path) -> None:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no llama_cpp; set LLAMA_PYTHON to an interpreter that has it")
    found = llama_cpp_choices(python, tuple(MODELS), tmp_path)
    assert set(found) == set(MODELS)
    for model, by_mix in found.items():
        assert {mix.split("+")[0] for mix in by_mix} == set(mixes()) - OURS
        for mix, types in by_mix.items():
            ours = recipe_choices(model, mix)
            if MODELS[model].tie_word_embeddings:
                types.pop("output.weight", None)
            assert in_words(ours) == in_words(types), (model, mix)
    for model in STORED_MODELS:
        stored = {mix: in_words(types) for mix, types in found[model].items()}
        assert stored == EXPECTED[model], "write tests/data/llama.cpp/mixes.json anew: support/mix_models.py"
