"""ModelConfig: what a model's mathematics needs, in Hugging Face's terms.

A format maps its own keys to these fields (``formats/<format>/config.py``); a model file
(``models/<family>.py``) reads them and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LayerType = Literal["full_attention", "sliding_attention"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "longrope", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    ``rotary_dim`` is how many of the ``head_dim`` features are rotated (partial rotary when
    smaller). ``interleaved`` says how the q and k rows of *this checkpoint* lie: False pairs
    feature i with i + rotary_dim/2 (Hugging Face), True pairs 2i with 2i + 1 (GGUF files of
    the llama architecture, whose q and k rows are permuted to suit).
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    """Context extension factor (linear, dynamic, llama3, yarn)."""
    original_max_position_embeddings: int | None = None
    """Trained context length before scaling; longrope switches its factors there."""
    low_freq_factor: float = 1.0
    """llama3 only."""
    high_freq_factor: float = 4.0
    """llama3 only."""
    short_factor: tuple[float, ...] = ()
    """longrope: rotary_dim/2 divisors used while the sequence is not longer than the original."""
    long_factor: tuple[float, ...] = ()
    """longrope: rotary_dim/2 divisors used once the sequence is longer than the original."""
    frequency_factors: tuple[float, ...] = ()
    """Divisors of each inverse frequency, given by the file (GGUF ``rope_freqs.weight``)."""
    attention_factor: float | None = None
    """Multiplies cos and sin; None means what the kind prescribes."""
    beta_fast: float = 32.0
    """yarn only."""
    beta_slow: float = 1.0
    """yarn only."""
    mscale: float = 0.0
    """yarn only; 0 means absent."""
    mscale_all_dim: float = 0.0
    """yarn only; 0 means absent."""


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of a decoder-only model.

    ``layer_types`` has one entry a layer. Values that a family does not use keep their default.
    """

    architecture: str
    """Model family: the name under which ``models/`` registers it (``llama``, ``phi3``, ...)."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    rms_norm_offset: float = 0.0
    """Added to every stored norm weight (Gemma in Hugging Face's form: 1; GGUF bakes it in: 0)."""
    hidden_act: str = "silu"
    """``silu``, ``gelu`` or ``gelu_pytorch_tanh``."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v projections."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    """RMS norm over each head of q and k before rotary (Qwen3, Gemma3)."""
    sliding_window: int | None = None
    """Keys that a query sees in a sliding layer, itself included; None: no sliding layer."""
    layer_types: tuple[LayerType, ...] = ()
    rope_layers: tuple[bool, ...] = ()
    """Whether each layer rotates q and k (SmolLM3 leaves some out); empty: all do."""
    rope_local: RopeConfig | None = None
    """Rotary of sliding layers where it differs (Gemma3)."""
    attention_scale: float | None = None
    """Multiplies q.k; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Logits of attention become cap * tanh(logit / cap) (Gemma2)."""
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    """Multiplies the embedding's output (Gemma: sqrt(hidden_size))."""
    logit_scale: float = 1.0
    """Multiplies the final logits (Granite-like families)."""
    residual_scale: float = 1.0
    extra: dict[str, object] = field(default_factory=dict, compare=False)
    """What a writer may want back and the mathematics does not need."""

    def layer_type(self, layer: int) -> LayerType:
        """The attention kind of one layer."""
        return self.layer_types[layer] if self.layer_types else "full_attention"

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of one layer, or None where the layer has none."""
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        if self.rope_local is not None and self.layer_type(layer) == "sliding_attention":
            return self.rope_local
        return self.rope

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None where it sees everything."""
        return self.sliding_window if self.layer_type(layer) == "sliding_attention" else None
