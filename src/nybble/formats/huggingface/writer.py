"""Writing a Hugging Face folder: config.json, safetensors with their index, tokenizer files, template.

The folder that is given is written into as it is; whoever calls stages it, so that nothing half done
is ever seen, and changes encodings and conventions before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.tensor import Tensor
from nybble.formats.huggingface.checkpoint import CONFIG, GENERATION_CONFIG
from nybble.formats.huggingface.write_config import config_json
from nybble.formats.json_text import write_object
from nybble.formats.output import Progress
from nybble.formats.safetensors.writer import DTYPES, SHARD_BYTES, write_shards

_TORCH_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_PERMUTATION = ".input_permutation"


def write_huggingface_folder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    shard_bytes: float = SHARD_BYTES,
    quantization: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes a checkpoint that is in Hugging Face's form; returns the files.

    Args:
        checkpoint: tensors in f32, f16, bf16 or affine encodings (``int4_g128_f16``, ...).
        folder: an existing folder; files of the same names are replaced.
        shard_bytes: most bytes of tensors in a file.
        quantization: how affine tensors are packed: ``awq``, ``gptq`` or ``compressed-tensors``; None:
            as the checkpoint was when it was read, else ``compressed-tensors``.
        progress: called with the bytes of tensors written, and all of them.

    Raises:
        ValueError: a tensor has an encoding that such folders cannot hold, or the config is not in
            Hugging Face's form or beyond its family's class in transformers; the message names it.
        UnsupportedError: the packing cannot hold an affine tensor; the message names it.
        OSError: the folder cannot be written.
    """
    checkpoint.require_no_adapters()
    content = config_json(checkpoint.config, checkpoint.metadata)
    tensors, packing = _packed(checkpoint, quantization)
    _set_dtype(content, checkpoint.tensors)
    if packing is not None:
        content["quantization_config"] = packing
    written = write_shards(
        tensors, folder, shard_bytes=shard_bytes, metadata={"format": "pt"}, progress=progress
    )
    path = folder / CONFIG
    write_object(path, content)
    return [path, *written, *_write_text_files(checkpoint, folder)]


def _packed(
    checkpoint: Checkpoint, quantization: str | None
) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """The tensors as the file holds them, and config.json's ``quantization_config``."""
    affine = False
    for name, tensor in checkpoint.tensors.items():
        kind = tensor.encoding.name
        if affine_format(kind) is not None or name.endswith(_PERMUTATION):
            affine = True
        elif kind not in DTYPES:
            raise ValueError(
                f"{name}: is {kind}, which Hugging Face folders cannot hold; choose f32, f16, bf16 or an"
                " affine encoding such as int4_g128_f16 for it"
            )
    if not affine:
        return checkpoint.tensors, None
    from nybble.formats.huggingface.quantized import pack_quantized

    return pack_quantized(checkpoint, quantization or _method(checkpoint.metadata))


def _method(metadata: Mapping[str, object]) -> str:
    config = metadata.get("huggingface.config")
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    return method if isinstance(method, str) else "compressed-tensors"


def _set_dtype(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Says in config.json which floating type most of the tensors that have one are in."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        name = tensor.encoding.name
        form = affine_format(name)
        name = name if form is None else form.scale
        if name in _TORCH_DTYPES:
            sizes[name] += tensor.nbytes
    content.pop("dtype", None)
    content.pop("torch_dtype", None)
    if sizes:
        content["torch_dtype"] = _TORCH_DTYPES[max(sorted(sizes), key=lambda name: sizes[name])]


def _write_text_files(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    from nybble.text.write_folder import folder_files

    paths = []
    for name, data in folder_files(checkpoint).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    generation = checkpoint.metadata.get("huggingface.generation_config")
    path = folder / GENERATION_CONFIG
    if isinstance(generation, dict) and path not in paths:  # a model without a tokenizer
        write_object(path, generation)
        paths.append(path)
    return paths
