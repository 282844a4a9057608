"""The model families: which function builds the graph of which architecture.

A new architecture is one file with a ``build`` function and one line in ``ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.errors import UnsupportedError
from nybble.graph.graph import Graph, GraphBuilder
from nybble.models import gemma, llama, phi3

__all__ = ["ARCHITECTURES", "build_graph"]

ARCHITECTURES: Mapping[str, Callable[[ModelConfig, GraphBuilder], Graph]] = MappingProxyType(
    {
        "llama": llama.build,
        "mistral": llama.build,  # Llama with a sliding window
        "smollm3": llama.build,  # Llama with layers that rotate nothing
        "qwen2": llama.build,  # Llama with a bias on q, k and v
        "qwen3": llama.build,  # Llama with norms on q and k
        "phi3": phi3.build,
        "gemma2": gemma.build,
        "gemma3": gemma.build,
    }
)
"""Graph builders by ``ModelConfig.architecture``."""


def build_graph(checkpoint: Checkpoint) -> Graph:
    """The operators of a model.

    Raises:
        UnsupportedError: no family is registered for the architecture (the message lists all), or
            the checkpoint has weights that the family does not use: without them the answers
            would be wrong.
        FormatError: a tensor is missing or its shape does not fit the config.
    """
    config = checkpoint.config
    build = ARCHITECTURES.get(config.architecture)
    if build is None:
        raise UnsupportedError(
            f"unknown model architecture {config.architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    graph = build(config, GraphBuilder(checkpoint.tensors))
    _check_all_used(checkpoint, graph)
    return graph


def _check_all_used(checkpoint: Checkpoint, graph: Graph) -> None:
    used = {name for node in graph.nodes for name in node.weights}
    if checkpoint.config.tie_word_embeddings:
        used.add("lm_head.weight")  # some files store the embedding twice
    unused = [
        name for name in checkpoint.tensors if name not in used and not name.endswith("rotary_emb.inv_freq")
    ]
    if unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        raise UnsupportedError(
            f"the checkpoint has {len(unused)} tensors that a model of the architecture"
            f" {checkpoint.config.architecture!r} with its config does not use: {shown}"
        )
