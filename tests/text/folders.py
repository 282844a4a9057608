"""Folders written from GGUF metadata, and texts full of special tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.text.tokenizer import GGUFTokenizerSource, Tokenizer
from nybble.text.vocabulary import TokenType
from nybble.text.write_folder import folder_files

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=0,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=2048,
    rope=RopeConfig(theta=1e4, rotary_dim=8),
)


def checkpoint(metadata: Mapping[str, object], **config: int) -> Checkpoint:
    """A model without weights whose tokenizer and template are those of GGUF metadata."""
    size = len(metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    template = metadata.get("tokenizer.chat_template")
    return Checkpoint(
        config=dataclasses.replace(CONFIG, **{"vocab_size": size, **config}),
        tensors={},
        tokenizer=GGUFTokenizerSource(metadata),
        chat_template=template if isinstance(template, str) else None,
        metadata=metadata,
    )


def folder(metadata: Mapping[str, object], path: Path) -> Path:
    """The folder of a GGUF file's tokenizer, written to ``path``."""
    for name, data in folder_files(checkpoint(metadata)).items():
        (path / name).write_bytes(data)
    return path


def special_texts(tokenizer: Tokenizer, count: int, seed: int = 1) -> list[str]:
    """Texts of special and user-defined tokens, white space and words in random order."""
    random_ = random.Random(seed)
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    names = [tokenizer.token_text(i) for i in tokenizer.vocabulary.of_type(*kinds)][:200]
    rest = [" ", "\n", "Hi", " you", "\t", "  ", "é", "中"]
    return [
        "".join(random_.choice([random_.choice(names), *rest]) for _ in range(random_.randint(1, 12)))
        for _ in range(count)
    ]
