"""llama.cpp reads what is written: logits of a small model of every family, greedy text of real ones.

Needs an interpreter that has llama_cpp: ``LLAMA_PYTHON`` names it, else this one is tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nybble
from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import LayerType, ModelConfig, RopeConfig
from nybble.checkpoint.encodings import encoding
from nybble.checkpoint.tensor import Tensor
from nybble.formats.gguf.checkpoint import read_gguf_checkpoint
from nybble.formats.gguf.config import ARCHITECTURES
from nybble.formats.gguf.names import LAYER_NAMES
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.text.tokenizer import GGUFTokenizerSource

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "support" / "llama_cpp_logits.py"
VOCABULARY: dict[str, object] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "a", "▁a"],
    "tokenizer.ggml.scores": np.zeros(262, np.float32),
    "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, 1, 1, 1], np.int32),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
IDS = [1, *range(40, 60), 259, 261, 260]


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[..., dict[str, Any]]:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no llama_cpp; set LLAMA_PYTHON to an interpreter that has it")

    def run(path: Path, ids: list[int], *, context: int = 128, count: int = 0) -> dict[str, Any]:
        arguments = [str(path), str(context), str(count), ",".join(map(str, ids))]
        done = subprocess.run(
            [python, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def small(architecture: str, **changes: Any) -> Checkpoint:
    """A random model in float32."""
    row = ARCHITECTURES[architecture]
    gemma = architecture.startswith("gemma")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32 if gemma or architecture == "qwen3" else 16,
        max_position_embeddings=256,
        rope=RopeConfig(500.0, 32 if gemma or architecture == "qwen3" else 16, interleaved=row.permuted),
        rms_norm_eps=1e-5,
        hidden_act=row.hidden_act,
        tie_word_embeddings=gemma,
        attention_bias=architecture == "qwen2",
        query_key_norm=architecture in ("qwen3", "gemma3"),
        rope_layers=(True, True, True, False) if architecture == "smollm3" else (),
        embedding_scale=8.0 if gemma else 1.0,
        attention_softcap=50.0 if architecture == "gemma2" else None,
        logit_softcap=30.0 if architecture == "gemma2" else None,
        rope_local=RopeConfig(10000.0, 32) if architecture == "gemma3" else None,
    )
    config = replace(config, **changes)
    return Checkpoint(config, weights(config), GGUFTokenizerSource(VOCABULARY), name="Small")


def weights(config: ModelConfig) -> dict[str, Tensor]:
    generator = np.random.default_rng(5)
    hidden, inner = config.hidden_size, config.intermediate_size
    width, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (width, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.qkv_proj": (width + 2 * narrow, hidden),
        "self_attn.o_proj": (hidden, width),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
    }
    result: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...]) -> None:
        values = generator.standard_normal(shape).astype(np.float32) * np.float32(0.1)
        values = values + 1 if len(shape) == 1 and "bias" not in name else values
        result[name] = Tensor(name, shape, encoding("f32"), values.reshape(-1).view(np.uint8))

    add("model.embed_tokens.weight", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        for name in LAYER_NAMES[config.architecture].values():
            add(f"model.layers.{layer}.{name}.weight", shapes.get(name, (hidden,)))
            if config.attention_bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                add(f"model.layers.{layer}.{name}.bias", shapes[name][:1])
    add("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        add("lm_head.weight", (config.vocab_size, hidden))
    return result


SLIDING: tuple[LayerType, ...] = ("sliding_attention",) * 4
ALTERNATING: tuple[LayerType, ...] = ("sliding_attention", "full_attention") * 2
FACTORS = tuple(1.0 + i / 4 for i in range(8))
LONG = RopeConfig(
    500.0,
    16,
    "longrope",
    factor=4.0,
    original_max_position_embeddings=512,
    short_factor=FACTORS,
    long_factor=tuple(4 * value for value in FACTORS),
)
CASES: dict[str, Checkpoint] = {
    "llama": small("llama"),
    "llama, divisors": small(
        "llama", rope=RopeConfig(500.0, 16, interleaved=True, frequency_factors=FACTORS)
    ),
    "llama, linear": small("llama", rope=RopeConfig(500.0, 16, "linear", interleaved=True, factor=4.0)),
    "mistral": small("mistral"),
    "smollm3": small("smollm3"),
    "qwen2": small("qwen2"),
    "qwen2, yarn": small(
        "qwen2", rope=RopeConfig(500.0, 16, "yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "qwen3": small("qwen3"),
    "phi3": small("phi3"),
    "phi3, partial rotary": small("phi3", rope=RopeConfig(500.0, 12)),
    "phi3, longrope": small("phi3", rope=LONG, max_position_embeddings=2048),
    "gemma2": small("gemma2", sliding_window=8, layer_types=ALTERNATING),
    "gemma3": small("gemma3", sliding_window=8, layer_types=SLIDING),
}


def assert_same_logits(
    path: Path, ids: list[int], context: int, llama_cpp: Callable[..., dict[str, Any]], first: int = 0
) -> None:
    theirs = np.array(llama_cpp(path, ids, context=context)["logits"], np.float32)[first:]
    with nybble.load(path, device="reference") as model:
        ours = model.logits(ids)[first:]
    scale = np.abs(ours).max()
    assert scale > 0.1
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_every_family(tmp_path: Path, case: str, llama_cpp: Callable[..., dict[str, Any]]) -> None:
    # llama.cpp takes longrope's factors by its context, which it rounds up to a multiple of 256.
    [path] = write_gguf(CASES[case], tmp_path / "small.gguf")
    assert_same_logits(path, IDS, 256, llama_cpp)


def test_logits_with_the_long_factors(tmp_path: Path, llama_cpp: Callable[..., dict[str, Any]]) -> None:
    [path] = write_gguf(CASES["phi3, longrope"], tmp_path / "small.gguf")
    # nybble takes them from the first token behind the original context on.
    assert_same_logits(path, (IDS * 24)[:520], 1024, llama_cpp, first=512)


@pytest.mark.real_model
@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "split"])
def test_greedy_text_of_real_models(
    tmp_path: Path,
    model: str,
    parts: bool,
    request: pytest.FixtureRequest,
    llama_cpp: Callable[..., dict[str, Any]],
) -> None:
    """Keys made from the config, not kept from the source."""
    original: Path = request.getfixturevalue(model)
    source = read_gguf_checkpoint(original)
    made = replace(source, metadata={}, format="safetensors")
    paths = write_gguf(made, tmp_path / "model.gguf", split_bytes=10**8 // 3 if parts else None)
    assert (len(paths) > 1) == parts
    assert source.tokenizer is not None
    ids = source.tokenizer.build().encode("The capital of France is", add_special=True)
    ours, theirs = (llama_cpp(path, ids, count=32) for path in (paths[0], original))
    assert len(theirs["tokens"]) == 32
    assert ours["tokens"] == theirs["tokens"]
    assert ours["text"] == theirs["text"]
