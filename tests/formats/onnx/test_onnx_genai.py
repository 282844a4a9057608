"""Written folders in onnxruntime-genai, and beside what its own model builder writes.

Needs onnxruntime-genai, and transformers for the builder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.forms import to_onnx_form
from nybble.devices import cpu, reference
from nybble.devices.base import BatchItem, Session
from nybble.formats.gguf.checkpoint import read_gguf_checkpoint
from nybble.formats.onnx.targets import TARGETS
from nybble.formats.onnx.write import write_onnx_folder
from support.onnx_runs import as_written, onnx_families
from support.random_checkpoints import random_checkpoint, tokens

genai = pytest.importorskip("onnxruntime_genai")

pytestmark = pytest.mark.oracle
FAMILIES = onnx_families()


def greedy(folder: Path, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that onnxruntime-genai generates."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(prompt) + count
    parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    found: list[int] = []
    while not generator.is_done() and len(found) < count:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def assert_greedy(
    session: Session, prompt: Sequence[int], found: Sequence[int], without: Sequence[int], margin: float
) -> None:
    """Each token is the best of ``session``'s logits, or within ``margin`` of it."""
    sequence = session.new_sequence()
    logits = session.forward([BatchItem(sequence, list(prompt), "last")])[0]
    for token in found:
        logits[list(without)] = -np.inf
        assert logits[token] >= logits.max() - margin
        logits = session.forward([BatchItem(sequence, [token], "last")])[0]


@pytest.mark.parametrize("target", ["onnx-cpu-fp32", "onnx-cpu-int4", "onnx-portable"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if "longrope" not in name])
def test_tiny_models_generate(family: str, target: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(FAMILIES[family])
    write_onnx_folder(checkpoint, tmp_path, target=target)
    found = greedy(tmp_path, tokens(12), 10)
    assert len(found) == 10
    session = reference.compile_session(as_written(checkpoint, target))
    # The end of text (2 where nothing is said) is held back. int8 activations move logits by some percent.
    assert_greedy(session, tokens(12), found, [2], 0.5 if target == "onnx-cpu-int4" else 1e-3)


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral-window", "phi3-window"])
def test_windowed_caches(family: str, windowed: bool, tmp_path: Path) -> None:
    """A prompt and an answer that are both longer than the window."""
    checkpoint = random_checkpoint(FAMILIES[family])
    target = replace(TARGETS["onnx-cpu-fp32"], windowed_cache=windowed)
    write_onnx_folder(checkpoint, tmp_path, target=target)
    found = greedy(tmp_path, tokens(15), 25)
    assert_greedy(reference.compile_session(checkpoint), tokens(15), found, [2], 1e-3)


@pytest.mark.parametrize("family", ["phi3-longrope", "phi3-longrope-window"])
@pytest.mark.parametrize("length", [12, 50])
def test_longrope_generates(family: str, length: int, tmp_path: Path) -> None:
    """On either side of the limit of 40 tokens."""
    checkpoint = random_checkpoint(FAMILIES[family])
    write_onnx_folder(checkpoint, tmp_path, target="onnx-cpu-fp32")
    found = greedy(tmp_path, tokens(length), 10)
    assert_greedy(reference.compile_session(checkpoint), tokens(length), found, [2], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision", "provider", "target"),
    [
        ("llama-grouped-tied", "int4", "cpu", "onnx-cpu-int4"),
        ("llama-biases", "fp32", "cpu", "onnx-cpu-fp32"),
        ("phi3-mini-4k", "int4", "dml", "onnx-dml-int4"),
        ("phi3-mini-4k", "int4", "cuda", "onnx-cuda-int4"),
        ("gemma2", "fp16", "cuda", "onnx-cuda-fp16"),
    ],
)
def test_as_the_builder(case: str, precision: str, provider: str, target: str, tmp_path: Path) -> None:
    """Inputs, outputs, nodes, names and genai_config.json are the builder's."""
    pytest.importorskip("transformers")
    from nybble.formats.huggingface.checkpoint import read_huggingface_checkpoint
    from support.model_cases import CASES
    from support.random_models import random_model

    kind, switches = CASES[case]
    if "head_dim" in switches:
        switches = {**switches, "head_dim": 32}
    # The builder drops the sliding window of models that name no layer types.
    random_model(
        kind, **{**switches, **({"sliding_window": None} if kind == "phi3" else {})}
    ).save_pretrained(tmp_path / "source")
    _add_tokenizer(tmp_path / "source")
    arguments = ["-i", tmp_path / "source", "-o", tmp_path / "builder", "-p", precision, "-e", provider]
    done = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = to_onnx_form(read_huggingface_checkpoint(tmp_path / "source"))
    # The builder's caches of sliding layers hold their window alone where the provider can.
    # Its norms for DirectML are float16.
    wanted = replace(TARGETS[target], windowed_cache=provider in ("cpu", "cuda"), float32_norms=False)
    write_onnx_folder(checkpoint, tmp_path / "ours", target=wanted, method="rtn")
    models = [onnx.load(tmp_path / name / "model.onnx") for name in ("builder", "ours")]
    theirs, ours = models

    def values(items: Any) -> list[tuple[str, int]]:
        return [(item.name, item.type.tensor_type.elem_type) for item in items]

    assert values(ours.graph.input) == values(theirs.graph.input)
    assert values(ours.graph.output) == values(theirs.graph.output)
    counts = [Counter(node.op_type for node in model.graph.node) for model in models]
    for count in counts:
        for plumbing in ("Constant", "Cast", "Reshape", "Transpose"):
            count.pop(plumbing, None)
    assert counts[0] == counts[1]
    attention = [
        [
            {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            for node in model.graph.node
            if node.op_type == "GroupQueryAttention"
        ]
        for model in models
    ]
    assert attention[0] == attention[1]
    stored = [
        {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer} for model in models
    ]
    assert {name for name in stored[0] if name not in stored[1]} <= {"lm_head.MatMul.weight"}
    for name, array in stored[0].items():
        if name in stored[1]:
            assert (stored[1][name].shape, stored[1][name].dtype) == (array.shape, array.dtype), name
        if name.endswith("_Q4") and name in stored[1]:
            scales = name.removesuffix("_Q4") + "_scales"
            weights = [_four_bits(found[name], found[scales]) for found in stored]
            # Both are the same weights, rounded: ours with a search for the scale of each block.
            assert np.abs(weights[0] - weights[1]).mean() < 0.15 * np.abs(weights[0]).mean(), name
    configs = [
        json.loads((tmp_path / name / "genai_config.json").read_text()) for name in ("builder", "ours")
    ]
    ends = configs[0]["model"].pop("eos_token_id"), configs[1]["model"].pop("eos_token_id")
    assert 2 in np.atleast_1d(ends[0]) and 2 in np.atleast_1d(ends[1])
    assert configs[0] == configs[1]


def _four_bits(packed: Any, scales: Any) -> Any:
    """Values of symmetric ``MatMulNBits`` weights (rows, blocks, elements)."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32)
    return (codes - 8) * scales.astype(np.float32).reshape(*packed.shape[:2], 1)


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_generates_the_same_text(smollm2_path: Path, tmp_path: Path) -> None:
    """The GGUF file's weights as float32: the tokens of nybble's CPU device."""
    checkpoint = _as_floats(to_onnx_form(read_gguf_checkpoint(smollm2_path)))
    write_onnx_folder(checkpoint, tmp_path, target="onnx-cpu-fp32")
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path)))
    prompt = [int(token) for token in tokenizer.encode("The capital of France is")]
    assert checkpoint.tokenizer is not None
    assert prompt == checkpoint.tokenizer.build().encode("The capital of France is", add_special=True)
    found = greedy(tmp_path, prompt, 24)
    assert tokenizer.decode(np.array(found, np.int32)).startswith(" Paris.")
    session = cpu.compile_session(read_gguf_checkpoint(smollm2_path))
    assert_greedy(session, prompt, found, [], 0.1)
    session.close()


def _as_floats(checkpoint: Checkpoint) -> Checkpoint:
    f32 = encoding("f32")
    return replace(
        checkpoint,
        tensors={
            name: tensor.changed(
                encoding=f32, data=lambda tensor=tensor: tensor.dequantize().reshape(-1).view(np.uint8)
            )
            for name, tensor in checkpoint.tensors.items()
        },
    )


def _add_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{i}>" if i < 21 else chr(20 + i): i for i in range(101)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<1>", eos_token="<2>", pad_token="<0>"
    ).save_pretrained(folder)
