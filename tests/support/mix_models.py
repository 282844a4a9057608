"""Models on whose layers llama.cpp's conditions differ, and what its mixes make of them, in few words.

    LLAMA_PYTHON=... PYTHONPATH=src:tests python tests/support/mix_models.py

writes tests/data/llama.cpp/mixes.json: the choices for two of the models, so that recipes are checked where
there is no llama.cpp. Types of a kind of matrix stand in the order of the layers: ``3 q6_k, 21 q4_k``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import to_gguf_form
from nybble.checkpoint.tensor import Tensor
from nybble.convert.rules import is_matrix
from nybble.formats.gguf.names import gguf_name
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.quantize.recipe import read_recipe, recipe_names
from support.conversions import WIDE
from support.random_checkpoints import FULL, GEMMA3, SLIDING, rope, shapes

SCRIPT = Path(__file__).with_name("llama_cpp_mixes.py")
STORED = Path(__file__).parents[1] / "data" / "llama.cpp" / "mixes.json"
STORED_MODELS = ("llama-groups-of-2", "phi3-groups-of-4")

BASE = replace(WIDE, num_hidden_layers=24)
MODELS: Mapping[str, ModelConfig] = {
    "llama-groups-of-2": BASE,
    "llama-groups-of-4": replace(BASE, num_key_value_heads=1),
    "llama-tied-33-layers": replace(BASE, tie_word_embeddings=True, num_hidden_layers=33),
    "llama-5-layers": replace(BASE, num_hidden_layers=5),
    "llama-narrow": replace(BASE, hidden_size=96, num_attention_heads=6, head_dim=16, rope=rope(16)),
    "phi3": replace(BASE, architecture="phi3"),
    "phi3-groups-of-4": replace(BASE, architecture="phi3", num_key_value_heads=1),
    "qwen2-17-layers": replace(BASE, architecture="qwen2", attention_bias=True, num_hidden_layers=17),
    "qwen3": replace(BASE, architecture="qwen3", query_key_norm=True),
    "gemma3": replace(
        GEMMA3,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        rope=rope(64),
        rope_local=rope(64),
        layer_types=(SLIDING, SLIDING, SLIDING, SLIDING, SLIDING, FULL) * 4,
        embedding_scale=16.0,
    ),
}
"""Groups are query heads that share a key head."""


def empty_model(config: ModelConfig) -> Checkpoint:
    """All tensors of a model, of zeros: matrices as float16."""
    tensors = {}
    for name, shape in shapes(config).items():
        kind = encoding("f16" if len(shape) == 2 else "f32")
        tensors[name] = Tensor(
            name, shape, kind, lambda n=kind.nbytes(int(np.prod(shape))): np.zeros(n, np.uint8)
        )
    return Checkpoint(config, tensors, name="empty")


def mixes() -> list[str]:
    """Recipes that may be llama.cpp's."""
    return [name for name in recipe_names() if read_recipe(name).to == "gguf"]


def llama_cpp_choices(
    python: str, models: Sequence[str], folder: Path
) -> dict[str, dict[str, dict[str, str]]]:
    """{model: {mix: {GGUF name: type}}} of an interpreter that has llama_cpp."""
    files = []
    for model in models:
        files.append(folder / f"{model}.gguf")
        write_gguf(to_gguf_form(empty_model(MODELS[model])), files[-1])
    target = folder / "choices.json"
    command = [python, str(SCRIPT), str(target), ",".join(mixes()), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    for file in files:
        file.unlink()
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, dict[str, dict[str, str]]] = json.loads(target.read_bytes())
    return found


def recipe_choices(model: str, mix: str) -> dict[str, str]:
    """The same of a recipe; ``NAME+importance``: where an importance matrix is given."""
    checkpoint = empty_model(MODELS[model])
    name, _, weighted = mix.partition("+")
    found = read_recipe(name).encodings_for(checkpoint, importance=bool(weighted))
    assert set(found) == {tensor.name for tensor in checkpoint.tensors.values() if is_matrix(tensor)}
    return {gguf_name(checkpoint.config.architecture, tensor): kind for tensor, kind in found.items()}


def in_words(types: Mapping[str, str]) -> dict[str, str]:
    """Types of each kind of matrix, in the order of the layers."""
    kinds: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        part = name[layer.end() if layer else 0 :].removesuffix(".weight")
        kinds.setdefault(part, {})[int(layer[1]) if layer else 0] = kind
    return {
        part: ", ".join(
            f"{len(list(run))} {kind}" for kind, run in groupby(kind for _, kind in sorted(by_layer.items()))
        )
        for part, by_layer in sorted(kinds.items())
    }


def main() -> None:
    """Ask llama.cpp and write."""
    with tempfile.TemporaryDirectory() as folder:
        python = os.environ.get("LLAMA_PYTHON", sys.executable)
        found = llama_cpp_choices(python, STORED_MODELS, Path(folder))
    lines = []
    for model, by_mix in found.items():
        rows = [f"  {json.dumps(mix)}: {json.dumps(in_words(types))}" for mix, types in by_mix.items()]
        lines.append(f" {json.dumps(model)}: {{\n" + ",\n".join(rows) + "\n }")
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii")


if __name__ == "__main__":
    main()
