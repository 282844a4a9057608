"""Small models with a tokenizer as GGUF files, and comparisons of what conversions give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.forms import to_gguf_form
from nybble.devices.reference import compile_session
from nybble.formats.gguf.metadata import GGUFMetadata
from nybble.formats.gguf.write_checkpoint import write_gguf
from nybble.loading import read_checkpoint
from nybble.text.tokenizer import GGUFTokenizerSource
from support import random_checkpoints

WIDE = replace(
    random_checkpoints.LLAMA,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope=random_checkpoints.rope(64),
)
"""Wide enough for the K types, whose blocks have 256 elements."""

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"
TOKENS = ["<unk>", "<s>", "</s>", "▁", *_LETTERS, *(f"▁{letter}" for letter in _LETTERS[:48])]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer_keys() -> dict[str, object]:
    """A vocabulary of ``random_checkpoints.VOCABULARY`` tokens."""
    assert len(TOKENS) == random_checkpoints.VOCABULARY
    kinds = [2, 3, 3, *[1] * (len(TOKENS) - 3)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": np.array(
            [0, 0, 0, *(-float(i) for i in range(len(TOKENS) - 3))], np.float32
        ),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def model_file(
    path: Path, config: ModelConfig = WIDE, *, weights: str = "q4_0", embeddings: str = "q8_0", seed: int = 0
) -> Path:
    """A GGUF file with random weights, a tokenizer and keys that no other format has."""
    checkpoint = random_checkpoints.random_checkpoint(config, seed, weights, embeddings)
    metadata = GGUFMetadata(tokenizer_keys())
    checkpoint = replace(
        to_gguf_form(checkpoint),
        metadata=metadata,
        tokenizer=GGUFTokenizerSource(metadata),
        chat_template=TEMPLATE,
        name="tiny",
    )
    write_gguf(checkpoint, path)
    # Once more with keys of its own, as a file has them that other tools made.
    read = read_checkpoint(path)
    keys = {**read.metadata, "general.author": "nobody", "general.quantized_by": "chance", "other.number": 7}
    types = {**getattr(read.metadata, "types", {}), "other.number": "uint8"}
    again = path.with_suffix(".again")
    write_gguf(replace(read, metadata=GGUFMetadata(keys, types)), again)
    again.replace(path)
    return path


def logits(path: Path | Checkpoint, length: int = 12) -> np.ndarray:
    """What the reference device computes for some tokens."""
    checkpoint = read_checkpoint(path) if isinstance(path, Path) else path
    return random_checkpoints.run(compile_session(checkpoint), random_checkpoints.tokens(length))
