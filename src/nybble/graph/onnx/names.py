"""Names of nodes and initializers: those of onnxruntime-genai's builder, so that tools know them."""

from __future__ import annotations

import re

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def stem(weight: str, num_layers: int) -> str:
    """The dotted name of what a canonical weight belongs to.

    ``model.layers.0.self_attn.q_proj.weight`` -> ``model.layers.0.attn.q_proj``;
    ``model.norm.weight`` -> ``model.layers.<number of layers>.final_norm_layernorm``.
    """
    name = weight.rpartition(".")[0]
    if name == "model.norm":
        return f"model.layers.{num_layers}.final_norm_layernorm"
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    rest = match[2].replace("self_attn.", "attn.")
    if rest.endswith(("q_norm", "k_norm")):
        rest += ".layernorm"
    return f"model.layers.{match[1]}.{rest}"


def path(dotted: str) -> str:
    """A stem as the path that names nodes: ``/model/layers.0/attn/q_proj``."""
    match = _LAYER.fullmatch(dotted)
    if match is None:
        return "/" + dotted.replace(".", "/")
    return f"/model/layers.{match[1]}/{match[2].replace('.', '/')}"
