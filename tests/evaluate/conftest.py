"""Tiny models of all formats and a text that they can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.convert.convert import convert
from support.conversions import model_file
from support.evaluations import random_text


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``f32.gguf``; the same as ``safetensors``, ``onnx``; and ``q4_0.gguf``, ``q8_0.gguf`` made from it."""
    root = tmp_path_factory.mktemp("models")
    source = model_file(root / "f32.gguf", weights="f32", embeddings="f32")
    convert(source, root / "safetensors", to="safetensors")
    convert(source, root / "onnx", to="onnx")
    for name in ("q4_0", "q8_0"):
        convert(source, root / f"{name}.gguf", to="gguf", encoding=name, allow_lossy=True)
    (root / "text.txt").write_text(random_text(120), encoding="utf-8")
    return root
