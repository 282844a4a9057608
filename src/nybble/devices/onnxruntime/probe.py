"""Tries a provider's GroupQueryAttention on a prompt before a model relies on it.

onnxruntime-webgpu 1.27 computes prompts wrong, without an error, where the GPU's subgroups are narrower
than its tile of keys (8 on Mesa's software Vulkan: from the 9th token on); single tokens come out right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.devices.onnxruntime.providers import Provider
from nybble.formats.onnx.decoder_io import CachePort
from nybble.formats.onnx.proto import import_onnx

TOKENS = 70
"""More than two tiles of 32 keys."""
TOLERANCE = 0.05
"""float16 is off by 0.003 here; a forgotten key by 0.2 and more."""


SMALL = CachePort("past", "present", "float32", heads=1, width=16)
"""The defect does not depend on widths and types, but compiling a kernel for wide heads takes half a
minute on a software GPU, and in float16 for ever."""


def attends_to_prompts(
    runtime: Any, provider: Provider, options: dict[str, str], cache: CachePort = SMALL
) -> bool:
    """Whether the provider's attention over a whole prompt is right."""
    model = _model(cache).SerializeToString()
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3
    session = runtime.InferenceSession(model, settings, providers=[(provider.ep, options)], enable_fallback=0)
    draw = np.random.default_rng(0)
    shape = (1, TOKENS, cache.heads * cache.width)
    q, k, v = (draw.normal(0, 1, shape).astype(cache.dtype) for _ in range(3))
    empty = np.zeros((1, cache.heads, 0, cache.width), cache.dtype)
    found = session.run(
        ["attended"],
        {
            "q": q, "k": k, "v": v, "past_key": empty, "past_value": empty,
            "last": np.array([TOKENS - 1], np.int32), "total": np.array([TOKENS], np.int32),
        },
    )[0]  # fmt: skip
    error = np.abs(found.astype(np.float32) - _reference(q, k, v, cache.heads)).max()
    return bool(error < TOLERANCE)


def _model(cache: CachePort) -> Any:
    onnx = import_onnx()
    helper, types = onnx.helper, onnx.TensorProto
    kind = types.FLOAT16 if cache.dtype == "float16" else types.FLOAT
    inputs = ["q", "k", "v", "past_key", "past_value", "last", "total"]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        ["attended", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=cache.heads,
        kv_num_heads=cache.heads,
    )
    flat = [1, "count", cache.heads * cache.width]
    past = [1, cache.heads, "past", cache.width]
    values = {name: (kind, flat if name in "qkv" else past) for name in inputs[:5]}
    values |= {"last": (types.INT32, [1]), "total": (types.INT32, [1])}
    outputs = {"attended": (kind, flat), "present_key": (kind, past), "present_value": (kind, past)}
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info(name, *value) for name, value in values.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _reference(
    q: npt.NDArray[Any], k: npt.NDArray[Any], v: npt.NDArray[Any], heads: int
) -> npt.NDArray[np.float32]:
    count, width = q.shape[1], q.shape[2] // heads

    def split(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(x.reshape(count, heads, width).swapaxes(0, 1), np.float32)

    scores = split(q) @ split(k).swapaxes(1, 2) * width**-0.5
    scores += np.triu(np.full((count, count), -np.inf, np.float32), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ split(v)
    joined: npt.NDArray[np.float32] = mixed.swapaxes(0, 1).reshape(1, count, heads * width)
    return joined
