"""Checkpoint: everything that a model is, whatever file it came from.

Readers (``formats/``) fill one; ``models/`` and ``devices/`` run it; writers empty it again.
Tensors are keyed by Hugging Face's names (``model.layers.0.self_attn.q_proj.weight``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError

if TYPE_CHECKING:
    from nybble.text.tokenizer import TokenizerSource


@dataclass
class Checkpoint:
    """A model as data.

    ``tensors`` maps canonical names to lazily mapped tensors. ``tokenizer`` describes the
    tokenizer without building it. ``chat_template`` is Jinja source or None; other templates of
    the file (``tool_use``, ...) are in ``chat_templates``. ``metadata`` holds what the file said
    and must survive a round trip.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: TokenizerSource | None = None
    chat_template: str | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    source: Path | None = None
    """The file or folder that this checkpoint was read from."""
    format: str = ""
    """``gguf``, ``safetensors`` or ``onnx``."""
    name: str = ""
    adapters: tuple[str, ...] = ()
    """Names of the LoRA adapters whose matrices ``with_adapters`` put among the tensors."""

    def require_no_adapters(self) -> None:
        """What every writer asks for first: files of models have no place for adapters beside weights.

        Raises:
            UnsupportedError: there are some.
        """
        if self.adapters:
            raise UnsupportedError(
                f"the model has LoRA adapters beside its weights ({', '.join(self.adapters)}), which no"
                " model file can hold: write the model without them, or merge them"
                " (nybble.convert(adapters=...))"
            )

    @property
    def nbytes(self) -> int:
        """Encoded size of all tensors in memory, bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Encoded size of all tensors in a file, bytes."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())
