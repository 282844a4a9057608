"""Which provider runs which node: asked of ONNX Runtime, because a fallback answers correctly too.

A node that a provider refuses moves to the CPU without a word. Nodes that only reckon with lengths
and token ids belong there; a matrix product or an attention does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

HEAVY = frozenset(
    {
        "Attention",
        "Conv",
        "Gemm",
        "GroupQueryAttention",
        "LayerNormalization",
        "MatMul",
        "MatMulInteger",
        "MatMulNBits",
        "MoE",
        "MultiHeadAttention",
        "QMoE",
        "RMSNormalization",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Softmax",
    }
)
"""Operators that must run on the provider that was asked for."""

RECORD = "session.record_ep_graph_assignment_info"
"""Session option that makes ``placement`` possible (ONNX Runtime 1.24 and later)."""


Placement = Mapping[str, Mapping[str, int]]
"""Number of nodes by provider (ONNX Runtime's name) and operator."""


def placement_of(session: Any) -> Placement | None:
    """Where a session runs its nodes; None where this ONNX Runtime cannot tell before it runs."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    found: dict[str, Counter[str]] = {}
    for part in ask():
        for node in part.get_nodes():
            found.setdefault(part.ep_name, Counter())[node.op_type] += 1
    return found or None


def placement_of_profile(events: list[dict[str, Any]]) -> Placement:
    """Where nodes ran, from the events of ONNX Runtime's profile."""
    found: dict[str, dict[str, set[str]]] = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in about and "op_name" in about:
            operators = found.setdefault(about["provider"], {})
            operators.setdefault(about["op_name"], set()).add(
                str(event.get("name", "")).rsplit("_kernel", 1)[0]
            )
    return {ep: {op: len(names) for op, names in operators.items()} for ep, operators in found.items()}


def strays(placement: Placement, ep: str) -> dict[str, int]:
    """Heavy operators that are not on the provider ``ep``, and how many nodes of each."""
    found: Counter[str] = Counter()
    for where, operators in placement.items():
        if where != ep:
            found.update({op: count for op, count in operators.items() if op in HEAVY})
    return dict(found)
