"""LoRA adapters by what is in a file or folder: PEFT's or GGUF's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from nybble.checkpoint.adapter import Adapter

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Opens a GGUF adapter or a PEFT folder; ``name`` None: the file's or folder's.

    Raises:
        NotFoundError: there is nothing, or a file of it is missing.
        FormatError: it is damaged.
        UnsupportedError: it is no LoRA adapter, or has parts that are not plain LoRA.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder; a LoRA adapter is needed")
    if _is_gguf(path):
        from nybble.formats.gguf.adapter import read_gguf_adapter

        return read_gguf_adapter(path, name)
    if _is_peft(path):
        from nybble.formats.huggingface.adapter import read_peft_adapter

        return read_peft_adapter(path, name)
    raise UnsupportedError(
        f"{path}: is no LoRA adapter that nybble knows; it reads PEFT folders ({_CONFIG} and {_WEIGHTS}) and"
        " GGUF adapters (*.gguf)"
    )


def is_adapter(path: Path) -> bool:
    """Whether a file or folder is an adapter and no model."""
    if _is_peft(path):
        return True
    if not _is_gguf(path):
        return False
    from nybble.formats.gguf.adapter import is_gguf_adapter
    from nybble.formats.gguf.reader import GGUFFile

    with GGUFFile.open(path) as file:
        return is_gguf_adapter(file.metadata)


def _is_peft(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    if not (folder / _CONFIG).is_file():
        return False
    # A folder may hold a model and an adapter; then the model's file names the model.
    if path.is_dir():
        return not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors"))
    return path.name in (_CONFIG, _WEIGHTS)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
