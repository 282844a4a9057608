"""Quantized Hugging Face checkpoints: AWQ, GPTQ and compressed-tensors, read and written without rounding.

Reading turns the pieces of each quantized linear (``X.qweight``, ``X.scales``, ...) into one tensor
``X.weight`` in an affine encoding (``checkpoint/encodings/affine.py``); writing takes it apart again.
Codes, scales and zero points move, bit for bit; nothing is computed before a tensor's data is asked for,
except that zero points and orders of columns, which are small, are looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.tensor import Tensor
from nybble.errors import UnsupportedError
from nybble.formats.fields import Fields
from nybble.formats.huggingface.quantized.awq import pack_awq, read_awq
from nybble.formats.huggingface.quantized.biases import without_zero_biases
from nybble.formats.huggingface.quantized.compressed_tensors import (
    pack_compressed_tensors,
    read_compressed_tensors,
    unused_settings,
)
from nybble.formats.huggingface.quantized.gptq import pack_gptq, read_gptq

__all__ = ["METHODS", "pack_quantized", "quantized_tensors", "unused_settings"]

_Read = Callable[[Mapping[str, Tensor], Mapping[str, object]], dict[str, Tensor]]
_Pack = Callable[[Checkpoint], tuple[dict[str, Tensor], dict[str, object]]]

_READERS: Mapping[str, _Read] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
}
_WRITERS: Mapping[str, _Pack] = {
    "awq": pack_awq,
    "gptq": pack_gptq,
    "compressed-tensors": pack_compressed_tensors,
}
METHODS = tuple(_READERS)
"""What ``quant_method`` may be."""


def quantized_tensors(
    raw: Mapping[str, Tensor], quantization_config: Mapping[str, object], config: ModelConfig | None = None
) -> Mapping[str, Tensor]:
    """Canonical tensors of a quantized checkpoint.

    Args:
        raw: the file's tensors by canonical name, in plain encodings.
        quantization_config: as in config.json.
        config: the model's config. With it biases that are all zero and that the model does not have
            are dropped: AutoGPTQ gave one to every linear.

    Returns:
        ``X.weight`` in an affine encoding for every quantized linear ``X``, ``X.input_permutation`` where
        its columns lie in another order, and the other tensors as they are.

    Raises:
        FormatError: a piece is missing, left over or of a wrong shape; the message names it.
        UnsupportedError: a method, format or width that is not known.
    """
    method = Fields(quantization_config, "quantization_config").string("quant_method").lower()
    read = _READERS.get(method)
    if read is None:
        raise UnsupportedError(
            f"quantization_config: quant_method is {method!r}; known: {', '.join(METHODS)}"
        )
    tensors = read(raw, quantization_config)
    return tensors if config is None else without_zero_biases(tensors, config)


def pack_quantized(checkpoint: Checkpoint, method: str) -> tuple[Mapping[str, Tensor], dict[str, object]]:
    """The tensors of a folder in one of the packings, and its ``quantization_config``.

    Args:
        checkpoint: in Hugging Face's form; affine weights are packed, others stay as they are.
        method: ``awq``, ``gptq`` or ``compressed-tensors``.

    Raises:
        UnsupportedError: the packing cannot hold a tensor; the message names it and says why. Where only
            the data can tell (a zero point out of range), the tensor's ``data`` raises it.
        ValueError: there is no such method.
    """
    write = _WRITERS.get(method)
    if write is None:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    return write(checkpoint)
