"""The graph's operators as ONNX nodes: a table of expansions for ONNX Runtime's own operators, one for
standard operators, and ``lower``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.checkpoint.config import ModelConfig
from nybble.checkpoint.encodings import Encoding
from nybble.errors import UnsupportedError
from nybble.graph.graph import Node, Value
from nybble.graph.onnx import attention, elementwise, linear, norms, portable, rotary
from nybble.graph.onnx.lowering import Lowering, Projection, Rotated, Sum
from nybble.graph.onnx.nodes import OnnxGraph
from nybble.graph.onnx.target import Method, Target
from nybble.models import build_graph

__all__ = ["EXPANSIONS", "PORTABLE_EXPANSIONS", "lower", "written_encodings"]

Expansion = Callable[[Lowering, Node], None]

EXPANSIONS: Mapping[str, Expansion] = MappingProxyType(
    {
        "embedding": linear.embedding,
        "linear": linear.linear,
        "split": linear.split,
        "gather_columns": linear.gather_columns,
        "rms_norm": norms.rms_norm,
        "rotary": rotary.rotary,
        "attention": attention.attention,
        "gated_activation": elementwise.gated_activation,
        "add": elementwise.add,
        "scale": elementwise.scale,
        "softcap": elementwise.softcap,
        "select_rows": elementwise.select_rows,
    }
)
"""What each operator becomes in ONNX Runtime's form."""

PORTABLE_EXPANSIONS: Mapping[str, Expansion] = MappingProxyType(
    {
        **EXPANSIONS,
        "rms_norm": portable.rms_norm,
        "rotary": portable.rotary,
        "attention": portable.attention,
    }
)
"""What each operator becomes in standard operators."""

_MAKERS: Mapping[type, Callable[[Lowering, Value, Any], str]] = {
    Projection: linear.make_projection,
    Sum: elementwise.make_sum,
    Rotated: rotary.make_rotated,
}


def lower(checkpoint: Checkpoint, target: Target, method: Method | None = None) -> OnnxGraph:
    """The ONNX graph of a model. The initializers' data is made when it is asked for.

    The checkpoint is in ONNX form: halves of heads rotate together, norms have no offset.

    Args:
        checkpoint: the model.
        target: what it is written for.
        method: how float weights become int4; None: as the target says.

    Raises:
        ValueError: the checkpoint is in another form, or a tensor's encoding does not fit the
            target; the message names it.
        UnsupportedError: an architecture or a rotary scaling that cannot be written.
        FormatError: tensors that are missing or do not fit the config.
    """
    config = checkpoint.config
    if config.rms_norm_offset:
        raise ValueError(
            f"norm weights have an offset of {config.rms_norm_offset:g}; bring the checkpoint into ONNX form"
            " first"
        )
    if not target.portable:
        check_heads(config, target)
    graph = build_graph(checkpoint)
    lowering = Lowering(graph, config, checkpoint.tensors, target, method, makers=_MAKERS)
    attention.declare_inputs(lowering)
    if target.pack_qkv:
        lowering.packs = linear.find_packs(lowering, graph)
    expansions = PORTABLE_EXPANSIONS if target.portable else EXPANSIONS
    for node in graph.nodes:
        expansions[node.operator](lowering, node)
    logits = lowering.name(graph.output, lowering.element_type)
    return lowering.finish(logits, attention.cache_outputs(lowering))


def written_encodings(
    checkpoint: Checkpoint, target: Target, method: Method | None = None
) -> dict[str, Encoding]:
    """The encodings that a model's matrices have once they are written, by name; errors as ``lower``.

    Differs from the checkpoint's own where floats become int4 or another float type, where groups are
    cut into blocks that ONNX Runtime knows, and where scales become the target's float type. A tied
    float embedding is what the output matrix is.
    """
    graph = build_graph(checkpoint)
    lowering = Lowering(graph, checkpoint.config, checkpoint.tensors, target, method)
    return {
        name: linear.encoding_of(lowering, checkpoint.tensors[name])
        for node in graph.nodes
        if node.operator in ("linear", "embedding")
        for name in node.weights[:1]
    }


def check_heads(config: ModelConfig, target: Target) -> None:
    """Refuses sizes of heads that ONNX Runtime's attention does not take.

    Raises:
        UnsupportedError: the message says which sizes it takes.
    """
    ropes = [rope for rope in (config.rope, config.rope_local) if rope is not None]
    rotated = target.rotary_in_attention and any(rope.rotary_dim % 16 for rope in ropes)
    if config.head_dim % (16 if target.rotary_in_attention else 8) or rotated:
        raise UnsupportedError(
            f"ONNX Runtime's GroupQueryAttention takes heads of a multiple of 16 features, all or a multiple"
            f" of 16 of them rotated; this model has {config.head_dim},"
            f" {', '.join(str(rope.rotary_dim) for rope in ropes)} rotated"
        )
