"""A model as data: config, tensors in their encodings, tokenizer, chat template, metadata."""

from __future__ import annotations

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig, RopeConfig
from nybble.checkpoint.tensor import Tensor

__all__ = ["Checkpoint", "ModelConfig", "RopeConfig", "Tensor"]
