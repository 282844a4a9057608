"""Biases of zeros that a quantizing tool gave to linears which have none."""

from __future__ import annotations

from collections.abc import Mapping

from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings.affine import affine_format
from nybble.checkpoint.tensor import Tensor


def without_zero_biases(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """``tensors`` less the biases of quantized linears that the model does not have and that are all zero."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.endswith(".bias") and _is_extra(name, tensors, config) and not tensor.data.any())
    }


def _is_extra(name: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> bool:
    module = name.removesuffix(".bias")
    weight = tensors.get(f"{module}.weight")
    if weight is None or affine_format(weight.encoding.name) is None:
        return False
    if ".mlp." in name:
        return not config.mlp_bias
    if module.endswith(".o_proj"):
        return not config.attention_output_bias
    return not (config.attention_bias and ".self_attn." in name)
