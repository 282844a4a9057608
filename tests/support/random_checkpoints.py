"""Tiny random checkpoints of every family, made with NumPy alone, and runs that compare two devices.

The families' mathematics is checked against transformers elsewhere (tests/models); devices are
checked against the reference device on these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.encodings import ENCODINGS, encoding
from nybble.checkpoint.tensor import Tensor
from nybble.devices.base import BatchItem, Session

Floats = npt.NDArray[np.float32]

VOCABULARY = 101
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(head_dim: int, **switches: object) -> RopeConfig:
    """Rotary embedding of the whole head, unless ``rotary_dim`` says otherwise."""
    return RopeConfig(**{"theta": 10000.0, "rotary_dim": head_dim, **switches})  # type: ignore[arg-type]


LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope=rope(16),
)
LONGROPE = rope(
    16,
    kind="longrope",
    factor=4.0,
    original_max_position_embeddings=40,
    short_factor=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 1.9),
    long_factor=(1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0, 20.0),
)
GEMMA2 = replace(
    LLAMA,
    architecture="gemma2",
    num_hidden_layers=4,
    head_dim=24,
    rope=rope(24),
    rms_norm_offset=1.0,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    sliding_window=9,
    layer_types=(SLIDING, FULL, SLIDING, FULL),
    attention_scale=20**-0.5,
    attention_softcap=1.5,
    logit_softcap=2.5,
    embedding_scale=8.0,
)
GEMMA3 = replace(
    GEMMA2,
    architecture="gemma3",
    query_key_norm=True,
    attention_softcap=None,
    logit_softcap=None,
    layer_types=(SLIDING, SLIDING, FULL, SLIDING),
    rope=rope(24, theta=1e6, kind="linear", factor=8.0),
    rope_local=rope(24),
)
WINDOW = {"sliding_window": 7, "layer_types": (SLIDING,) * 3}

FAMILIES: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "llama-gguf": replace(LLAMA, rope=rope(16, interleaved=True), tie_word_embeddings=True),
    "llama-biases": replace(LLAMA, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "llama-scales": replace(LLAMA, logit_scale=0.3, residual_scale=0.6, hidden_act="gelu"),
    "mistral-window": replace(LLAMA, architecture="mistral", **WINDOW),
    "smollm3": replace(LLAMA, architecture="smollm3", rope_layers=(True, False, True)),
    "qwen2": replace(LLAMA, architecture="qwen2", attention_bias=True, tie_word_embeddings=True),
    "qwen3": replace(LLAMA, architecture="qwen3", query_key_norm=True, head_dim=24, rope=rope(24)),
    "phi3": replace(LLAMA, architecture="phi3"),
    "phi3-window": replace(LLAMA, architecture="phi3", **WINDOW),
    "phi3-longrope": replace(LLAMA, architecture="phi3", rope=LONGROPE),
    "phi3-longrope-window": replace(LLAMA, architecture="phi3", rope=LONGROPE, **WINDOW),
    "phi4-mini": replace(
        LLAMA, architecture="phi3", head_dim=20, rope=rope(20, rotary_dim=14), tie_word_embeddings=True
    ),
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
"""Every switch that the families have, by a name for the case."""


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights that a config asks for."""
    hidden, size = config.hidden_size, config.intermediate_size
    query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    parts: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    biases: dict[str, int] = {}
    if config.architecture == "phi3":
        parts |= {"self_attn.qkv_proj": (query + 2 * key, hidden), "mlp.gate_up_proj": (2 * size, hidden)}
    else:
        parts |= {f"self_attn.{n}_proj": (query if n == "q" else key, hidden) for n in "qkv"}
        parts |= {f"mlp.{n}_proj": (size, hidden) for n in ("gate", "up")}
    parts |= {"self_attn.o_proj": (hidden, query), "mlp.down_proj": (hidden, size)}
    for name, shape in parts.items():
        with_bias = config.mlp_bias if name.startswith("mlp") else config.attention_bias
        if name == "self_attn.o_proj":
            with_bias = config.attention_output_bias
        if len(shape) == 2 and with_bias:
            biases[name] = shape[0]
    if config.architecture.startswith("gemma"):
        parts |= {f"{when}_feedforward_layernorm": (hidden,) for when in ("pre", "post")}
    if config.query_key_norm:
        parts |= {f"self_attn.{n}_norm": (config.head_dim,) for n in "qk"}
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        result |= {f"{prefix}{name}.weight": shape for name, shape in parts.items()}
        result |= {f"{prefix}{name}.bias": (size,) for name, size in biases.items()}
    result["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        result["lm_head.weight"] = (config.vocab_size, hidden)
    return result


def random_checkpoint(
    config: ModelConfig, seed: int = 0, weights: str = "f32", embeddings: str = "f32"
) -> Checkpoint:
    """Random weights for a config.

    ``weights`` and ``embeddings`` are encodings: of the matrices of the layers, and of the
    embedding and the output matrix. Norm weights and biases are float32.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(config).items():
        if len(shape) == 2:
            outer = name in ("model.embed_tokens.weight", "lm_head.weight")
            kind = embeddings if outer else weights
            gain = (
                1.0 / config.embedding_scale if name == "model.embed_tokens.weight" else 1.5 / shape[1] ** 0.5
            )
            data = encoded(random, kind, shape, gain)
        else:
            kind = "f32"
            offset = 1.0 - config.rms_norm_offset if name.endswith("norm.weight") else 0.0
            values = (random.standard_normal(shape) * 0.3 + offset).astype(np.float32)
            data = values.view(np.uint8)
        tensors[name] = Tensor(name, shape, encoding(kind), data)
    return Checkpoint(config, tensors, name="random")


SCALES = {
    "q4_1": (0, 2),
    "q5_1": (0, 2),
    "q8_1": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
    "q8_k": (),
    "iq1_m": (),
    "mxfp4": (),
    "nvfp4": (),
}
"""Byte offsets of the float16 scales in a block; (0,) where nothing else is said."""


def encoded(
    random: np.random.Generator, kind: str, shape: tuple[int, ...], deviation: float
) -> npt.NDArray[np.uint8]:
    """A random matrix in an encoding with about that standard deviation, flat bytes.

    Quantized normal values where the encoding has a quantizer; random codes otherwise.
    """
    row = ENCODINGS[kind]
    values = (random.standard_normal(shape) * deviation).astype(np.float32).reshape(-1)
    if row.quantize is not None:
        return row.quantize(values)
    blocks = random.integers(0, 256, (values.size // row.block_size, row.block_bytes), dtype=np.uint8)
    _set_scales(random, kind, blocks, 1.0)
    # Scales act linearly: look at what came out and set them anew.
    with np.errstate(all="ignore"):
        spread = float(row.dequantize(blocks.reshape(-1)).std())
    assert np.isfinite(spread) and spread > 0, kind
    _set_scales(random, kind, blocks, deviation / spread)
    return blocks.reshape(-1)


def _set_scales(random: np.random.Generator, kind: str, blocks: npt.NDArray[np.uint8], factor: float) -> None:
    count = len(blocks)
    if kind == "mxfp4":
        blocks[:, 0] = np.clip(127 + np.round(np.log2(factor)), 1, 254)
        return
    if kind == "nvfp4":
        # Three bits of fraction: the byte is about 8 * log2(scale) + 56.
        middle = int(np.clip(56 + np.round(8 * np.log2(0.25 * factor)), 16, 110))
        blocks[:, :4] = random.integers(middle - 8, middle + 1, (count, 4))
        return
    if kind == "q8_k":
        blocks[:, :4] = np.float32(0.05 * factor).reshape(1).view(np.uint8)
        return
    if kind == "iq1_m":
        # The float16 scale lies in the upper four bits of four 16-bit words.
        bits = int(np.float16(0.25 * factor).view(np.uint16))
        for word in range(4):
            high = blocks[:, 48 + 2 * word + 1]
            high[:] = (high & 0x0F) | (((bits >> (4 * word)) & 0xF) << 4)
        return
    for at in SCALES.get(kind, (0,)):
        scale = (random.uniform(0.5, 1.0, (count, 1)) * 0.25 * factor).astype("<f2")
        blocks[:, at : at + 2] = scale.view(np.uint8)


def tokens(count: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]


def run(session: Session, ids: Sequence[int], sizes: Sequence[int] = ()) -> Floats:
    """Logits of every token of a new sequence, run in chunks of these sizes and then the rest at once."""
    sequence = session.new_sequence()
    rows, begin = [], 0
    for size in (*sizes, len(ids)):
        chunk = ids[begin : begin + size]
        if chunk:
            rows.append(session.forward([BatchItem(sequence, chunk, "all")]))
        begin += size
    assert sequence.tokens == list(ids)
    sequence.close()
    return np.concatenate(rows)


def largest_difference(actual: Floats, expected: Floats) -> float:
    """Largest difference of logits, relative to the largest logit."""
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    return float(np.abs(actual - expected).max(initial=0) / np.abs(expected).max(initial=1e-30))


def relative_error(actual: Floats, expected: Floats) -> float:
    """Root mean square of the differences, relative to that of the logits."""
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    difference = np.float64(actual) - np.float64(expected)
    return float(np.sqrt((difference**2).mean() / (np.float64(expected) ** 2).mean()))


def with_tensors(checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint with some tensors replaced."""
    return replace(checkpoint, tensors={**checkpoint.tensors, **changed})
