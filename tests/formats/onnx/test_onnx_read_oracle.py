"""Folders made on the spot by onnxruntime-genai's model builder, read and run beside onnxruntime-genai.

Needs torch, transformers and onnxruntime-genai.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble import devices
from nybble.formats.onnx.read import read_onnx_checkpoint

transformers = pytest.importorskip("transformers")
genai = pytest.importorskip("onnxruntime_genai")
torch = pytest.importorskip("torch")

from support.random_models import assert_close, check_all_ways, oracle, random_model, tokens  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
PROMPT = "The capital of France is"


def build(source: Path, target: Path, precision: str, *options: str) -> None:
    """The builder's folder, in a process of its own: it changes global state and prints a lot."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
    command += ["-p", precision, "-e", "cpu", "-c", str(target.parent / "cache")]
    if options:
        command += ["--extra_options", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]


def save(model, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:98]
    vocabulary = {text: at for at, text in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "switches"),
    [
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("phi3", {"original_max_position_embeddings": 128, "sliding_window": None}),
    ],
)
def test_float32_is_the_model_that_was_built(kind, switches, tmp_path):
    model = random_model(kind, **switches)
    save(model, tmp_path / "hf")
    build(tmp_path / "hf", tmp_path / "onnx", "fp32")
    checkpoint = read_onnx_checkpoint(tmp_path / "onnx")
    assert checkpoint.config.architecture == kind
    check_all_ways(devices.compile(checkpoint, device="reference", context_length=64), model)
    found = nybble.load(tmp_path / "onnx", device="reference").logits(tokens(20))
    assert_close(np.asarray(found), oracle(model, tokens(20)))


@pytest.mark.real_model
def test_layers_of_smollm2_in_int4_say_what_onnxruntime_genai_says(smollm2_path, tmp_path):
    """Both without rounding of activations, on the same file."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_hidden_layers = 6  # of 30: the builder takes minutes for all
    config.layer_types = None
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    model.save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    ).save_pretrained(tmp_path / "hf")
    build(tmp_path / "hf", tmp_path / "onnx", "int4", "accuracy_level=0", "shared_embeddings=true")
    ours = nybble.load(tmp_path / "onnx", device="cpu")
    assert ours.checkpoint.config.tie_word_embeddings
    text = ours.generate(PROMPT, max_tokens=48, temperature=0)
    assert text == theirs(tmp_path / "onnx", ours.tokenizer, 48)


def theirs(folder: Path, tokenizer, count: int) -> str:
    """onnxruntime-genai's greedy text."""
    ids = tokenizer.encode(PROMPT, add_special=False)
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    found: list[int] = []
    while not generator.is_done() and len(found) < count:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    text: str = tokenizer.decode(found)
    return text
