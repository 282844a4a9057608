"""Destination: one target of a conversion, with its rules, its writer, and the shape of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.convert.rules import GGUFRules, Rules, SafetensorsRules
from nybble.errors import UnsupportedError
from nybble.formats.output import Note, Progress
from nybble.text.tokenizer import FolderTokenizerSource

Format = Literal["gguf", "safetensors", "onnx"]
Write = Callable[[Checkpoint, Path, Progress, Note], list[Path]]

DEFAULT_ONNX = "onnx-cpu-fp32"
"""The ONNX target whose types ``onnx`` alone means: nothing is prescribed, so that nothing is lost."""


@dataclass(frozen=True)
class Destination:
    """Where a conversion goes."""

    format: Format
    rules: Rules
    is_folder: bool
    write: Write
    """Writes the checkpoint to a path that is not seen yet; returns the files, and calls for each sentence
    about what the format cannot say."""

    @property
    def keeps_blocks(self) -> bool:
        """Whether blocks that become plain numbers leave a record, so that they can be blocks again."""
        return self.format != "gguf"

    def generated_tokenizer(self, read: Checkpoint, written: Path) -> Mapping[str, object]:
        """The GGUF keys that the written tokenizer files give back; none where nobody will ask."""
        if self.format == "gguf" or read.format != "gguf" or not (written / "tokenizer.json").is_file():
            return {}
        from nybble.formats.huggingface.templates import read_chat_templates
        from nybble.text.write_gguf import gguf_tokenizer_metadata

        template, named = read_chat_templates(written)
        folder = Checkpoint(
            read.config, {}, FolderTokenizerSource(written), chat_template=template, chat_templates=named
        )
        try:
            return gguf_tokenizer_metadata(folder)
        except UnsupportedError:
            return {}  # then all keys are kept as they are


def destination(
    to: str, *, quantization: str | None = None, method: str | None = None, split_bytes: int | None = None
) -> Destination:
    """The destination of that name.

    Raises:
        UnsupportedError: there is none, or an option does not go with it; the message lists them.
    """
    if quantization is not None and to != "safetensors":
        raise UnsupportedError(f"--quantization is for safetensors, not {to}")
    if method is not None and not to.startswith("onnx"):
        raise UnsupportedError(f"--method is for ONNX targets, not {to}")
    if split_bytes is not None and (split_bytes <= 0 or to not in ("gguf", "safetensors")):
        raise UnsupportedError("--split-bytes is a positive number, for gguf and safetensors")
    if to == "gguf":
        return _gguf(split_bytes)
    if to == "safetensors":
        return _safetensors(quantization, split_bytes)
    from nybble.formats.onnx.targets import TARGETS

    if to != "onnx" and to not in TARGETS:
        raise UnsupportedError(f"unknown target {to!r}; known: gguf, safetensors, onnx, {', '.join(TARGETS)}")
    return _onnx(to, method)


def _gguf(split_bytes: int | None) -> Destination:
    def write(checkpoint: Checkpoint, path: Path, progress: Progress, note: Note) -> list[Path]:
        from nybble.formats.gguf.write_checkpoint import write_gguf

        if split_bytes is None:
            return write_gguf(checkpoint, path, progress=progress, note=note)
        file = path / "model.gguf"
        return write_gguf(checkpoint, file, split_bytes=split_bytes, progress=progress, note=note)

    return Destination("gguf", GGUFRules(), split_bytes is not None, write)


def _safetensors(quantization: str | None, split_bytes: int | None) -> Destination:
    if quantization is not None:
        from nybble.formats.huggingface.quantized import METHODS

        if quantization not in METHODS:
            raise UnsupportedError(f"unknown quantization {quantization!r}; known: {', '.join(METHODS)}")

    def write(checkpoint: Checkpoint, path: Path, progress: Progress, note: Note) -> list[Path]:
        from nybble.formats.huggingface.writer import write_huggingface_folder
        from nybble.formats.safetensors.writer import SHARD_BYTES

        shard_bytes = SHARD_BYTES if split_bytes is None else split_bytes
        return write_huggingface_folder(
            checkpoint, path, shard_bytes=shard_bytes, quantization=quantization, progress=progress
        )

    return Destination("safetensors", SafetensorsRules(quantization), True, write)


def _onnx(to: str, method: str | None) -> Destination:
    from nybble.convert.onnx_rules import OnnxRules
    from nybble.formats.onnx.targets import target_named

    if method not in (None, "rtn"):
        raise UnsupportedError(f"unknown method {method!r}; known: rtn")
    target = target_named(DEFAULT_ONNX if to == "onnx" else to)

    def write(checkpoint: Checkpoint, path: Path, progress: Progress, note: Note) -> list[Path]:
        from nybble.formats.onnx.write import write_onnx_folder

        # The plan has decided about every tensor; the writer rounds nothing that it left float.
        write_onnx_folder(checkpoint, path, target=replace(target, weights="float"), progress=progress)
        return [file for file in path.rglob("*") if file.is_file()]

    return Destination("onnx", OnnxRules(target, method, prescribes=to != "onnx"), True, write)
