"""The vocabularies of tests/data/llama.cpp, read and built once."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from nybble.formats.gguf.reader import GGUFFile
from nybble.text.tokenizer import GGUFTokenizerSource, Tokenizer

DATA = Path(__file__).parent.parent / "data" / "llama.cpp"
NAMES = ("bert-bge", "deepseek-coder", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")


@cache
def metadata(name: str) -> Mapping[str, object]:
    data = gzip.decompress((DATA / "vocab" / f"ggml-vocab-{name}.gguf.gz").read_bytes())
    return GGUFFile.from_bytes(data).metadata


@cache
def tokenizer(name: str) -> Tokenizer:
    return GGUFTokenizerSource(metadata(name)).build()


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """(text, expected ids); phi-3 shares llama-spm's."""
    stem = "llama-spm" if name == "phi-3" else name
    texts = (DATA / "vocab" / "texts.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (DATA / "vocab" / f"ggml-vocab-{stem}.gguf.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines)]
