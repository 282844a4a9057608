"""llama.cpp reads the GGUF adapters that are written, and applies them as nybble does.

Needs an interpreter that has llama_cpp: ``LLAMA_PYTHON`` names it, else this one is tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nybble
from nybble.checkpoint.adapter import Adapter, LoraPair
from nybble.checkpoint.apply_adapters import with_adapters
from nybble.convert.convert import convert
from nybble.devices import reference
from nybble.devices.base import BatchItem
from nybble.formats.adapter import read_adapter
from nybble.formats.huggingface.adapter import write_peft_adapter
from nybble.loading import read_checkpoint
from support.adapters import matrix, random_adapter
from support.conversions import model_file
from support.random_checkpoints import FAMILIES, largest_difference, tokens

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "support" / "llama_cpp_logits.py"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def llama_cpp() -> Run:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no llama_cpp; set LLAMA_PYTHON to an interpreter that has it")

    def run(path: Path, ids: list[int], count: int, *adapter: object) -> dict[str, Any]:
        arguments = [str(path), "128", str(count), ",".join(map(str, ids)), *map(str, adapter)]
        done = subprocess.run(
            [python, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "qwen2"])
def test_logits(family: str, llama_cpp: Run, tmp_path: Path) -> None:
    config = FAMILIES[family]
    source = model_file(tmp_path / "model.gguf", config, weights="f32", embeddings="f32")
    only = ("proj.weight", "embed_tokens.weight") if family == "qwen3" else ("proj.weight",)
    (tmp_path / "a").mkdir()
    write_peft_adapter(random_adapter(config, only=only), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=source)
    session = reference.compile_session(
        with_adapters(read_checkpoint(source), [read_adapter(tmp_path / "a")])
    )
    ids = tokens(16)
    plain = np.array(llama_cpp(source, ids, 0)["logits"], np.float32)
    for weight in (1.0, 0.5):
        found = np.array(llama_cpp(source, ids, 0, tmp_path / "a.gguf", weight)["logits"], np.float32)
        ours = session.forward([BatchItem(session.new_sequence((weight,)), ids, "all")])
        assert largest_difference(ours, found) < 2e-3
        assert largest_difference(found, plain) > 0.05


@pytest.mark.real_model
def test_text(smollm2_path: Path, llama_cpp: Run, tmp_path: Path) -> None:
    """Greedy text of SmolLM2 with a random adapter, at two weights, and merged."""
    tensors = read_checkpoint(smollm2_path).tensors
    random = np.random.default_rng(6)
    pairs = {}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            size = float(np.abs(tensor.dequantize()).mean())
            a = matrix(random, f"{name}.A", (8, columns), "f32", columns**-0.5)
            b = matrix(random, f"{name}.B", (rows, 8), "f32", 0.02 * size * columns**0.5)
            pairs[name] = LoraPair(a, b, 2.0)
    (tmp_path / "a").mkdir()
    write_peft_adapter(Adapter("a", pairs), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=smollm2_path)
    texts = set()
    with nybble.load(smollm2_path, adapters=[tmp_path / "a.gguf"], precision="f32") as model:
        ids = model.tokenizer.encode("The capital of France is", add_special=True)
        for weight in (1.0, 0.5):
            found = llama_cpp(smollm2_path, ids, 24, tmp_path / "a.gguf", weight)["tokens"]
            options: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
            reply = model.complete(ids, adapters={"a": weight}, logprobs=2, **options)
            texts.add(reply.text)
            # llama.cpp computes with int8 activations: a near tie may fall the other way.
            same = next(
                (i for i, (x, y) in enumerate(zip(reply.token_ids, found, strict=False)) if x != y), 24
            )
            if same < 24:
                best, second = (row[1] for row in reply.choices[0].logprobs[same].top[:2])
                assert best - second < 0.2, (weight, same, reply.text)
        plain = model.complete(ids, adapters={}, **options).text
        assert plain not in texts and len(texts) == 2
        convert(smollm2_path, tmp_path / "merged.gguf", to="gguf", adapters=[tmp_path / "a"], encoding="f32")
        with nybble.load(tmp_path / "merged.gguf", precision="f32") as merged:
            difference = largest_difference(merged.logits(ids), model.logits(ids))
            assert difference < 1e-4
