"""The kinds of ONNX folders that nybble writes, as data: what each execution provider wants.

The values are the defaults of ``onnxruntime_genai.models.builder`` (0.18) for the same provider and
precision, where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nybble.errors import UnsupportedError
from nybble.graph.onnx.target import Method, Target

__all__ = ["TARGETS", "Method", "Target", "target_named"]

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                "onnx-cpu-int4",
                "ONNX Runtime on CPUs and phones: int4 weights, float32 activations",
                "f32",
                weights="int4",
                accuracy_level=4,
                method="rtn",
            ),
            Target("onnx-cpu-fp32", "ONNX Runtime on CPUs: float32", "f32"),
            Target(
                "onnx-cuda-fp16",
                "ONNX Runtime on NVIDIA GPUs: float16",
                "f16",
                provider="cuda",
                provider_options={"enable_cuda_graph": "0"},
            ),
            Target(
                "onnx-cuda-int4",
                "ONNX Runtime on NVIDIA GPUs: int4 weights, float16 activations",
                "f16",
                provider="cuda",
                weights="int4",
                method="rtn",
                provider_options={"enable_cuda_graph": "0"},
            ),
            Target(
                "onnx-dml-int4",
                "ONNX Runtime with DirectML on Windows: int4 weights made by AWQ, float16 activations",
                "f16",
                provider="dml",
                weights="int4",
                rotary_in_attention=False,
                pack_qkv=False,
                float32_norms=True,
                provider_options={"enable_graph_capture": "1"},
            ),
            Target(
                "onnx-portable",
                "any runtime: standard operators only, float32 activations, weights as they are",
                "f32",
                rotary_in_attention=False,
                pack_qkv=False,
                portable=True,
                opset=26,
                ir_version=13,
            ),
            Target(
                "onnx-portable-int4",
                "any runtime: standard operators only, float32 activations, int4 weights",
                "f32",
                weights="int4",
                method="rtn",
                rotary_in_attention=False,
                pack_qkv=False,
                portable=True,
                opset=26,
                ir_version=13,
            ),
        )
    }
)
"""Every target by name."""


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        UnsupportedError: there is none; the message lists all.
    """
    target = TARGETS.get(name)
    if target is None:
        raise UnsupportedError(f"unknown ONNX target {name!r}; known: {', '.join(TARGETS)}")
    return target
