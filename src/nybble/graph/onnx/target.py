"""Target: what an expansion to ONNX must know about the runtime that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nybble.checkpoint.config import ModelConfig

Method = Literal["rtn"]
"""How float weights become int4: round to nearest."""


@dataclass(frozen=True)
class Target:
    """One kind of ONNX model; the table is ``formats/onnx/targets.py``."""

    name: str
    description: str
    element_type: Literal["f32", "f16"]
    """Of activations, caches, logits and scales."""
    provider: Literal["cpu", "cuda", "dml"] = "cpu"
    weights: Literal["float", "int4"] = "float"
    """What float weights of linears become; weights that are integers already stay as they are."""
    block_size: int = 32
    """Weights that share a scale, for int4."""
    accuracy_level: int = 0
    """``MatMulNBits``: 4 lets activations be quantized to int8, 0 keeps them."""
    method: Method | None = None
    """How float weights become int4 where the caller does not say; None: only by name."""
    rotary_in_attention: bool = True
    """Whether GroupQueryAttention rotates q and k itself; DirectML's cannot."""
    pack_qkv: bool = True
    """Whether q, k and v are one multiplication; DirectML's attention wants them apart."""
    float32_norms: bool = False
    """Whether RMS norms run in float32 although activations are float16: DirectML's float16 norm keeps
    the mean of squares in float16, so a token whose root mean square is above 255.9 comes out too large."""
    portable: bool = False
    """Whether only standard operators are used."""
    windowed_cache: bool = False
    """Whether sliding layers keep only their window (``sliding_window_cache``): less memory for long
    contexts, but ONNX Runtime before 1.31 cannot load it, callers must hold such caches, and
    onnxruntime-genai fails where max_length is below the window."""
    opset: int = 22
    ir_version: int = 10
    provider_options: Mapping[str, str] = field(default_factory=dict)
    """For genai_config.json."""

    def cache_window(self, config: ModelConfig, layer: int) -> int | None:
        """Positions that the cache of a layer keeps; None: all."""
        window = config.layer_window(layer)
        if not self.windowed_cache or window is None or window >= config.max_position_embeddings:
            return None
        return window
