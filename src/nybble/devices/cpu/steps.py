"""Steps: a graph after fusion, before buffers are assigned.

Each step is one operator of the native plan. Values that are views of another one (splits) or that
never leave a fused step have no storage of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.checkpoint.config import RopeConfig


@dataclass(frozen=True)
class Place:
    """Columns of a storage; a storage becomes a buffer, or the caller's output array."""

    storage: int
    offset: int = 0


@dataclass(frozen=True)
class NormWeights:
    """An RMS norm's weight and constants."""

    weight: str
    eps: float
    offset: float


@dataclass
class Step:
    """Base of all steps. ``selected``: works on the rows whose logits are asked for."""

    selected: bool = field(default=False, kw_only=True)

    def reads(self) -> list[Place]:
        """Places read."""
        return []

    def writes(self) -> list[Place]:
        """Places written."""
        return []


class MappingStep(Step):
    """Base of the steps that read ``x`` and write ``out``; they are fields of each, in its own order."""

    x: Place
    out: Place

    def reads(self) -> list[Place]:
        return [self.x]

    def writes(self) -> list[Place]:
        return [self.out]


@dataclass
class EmbeddingStep(Step):
    """Rows of a matrix picked by token."""

    weight: str
    scale: float
    out: Place

    def writes(self) -> list[Place]:
        return [self.out]


@dataclass
class HiddenStep(Step):
    """The caller's hidden states: what a plan of some layers starts with."""

    out: Place

    def writes(self) -> list[Place]:
        return [self.out]


@dataclass
class TapStep(Step):
    """Sums over the rows of norm(x), which the linears of ``weights`` are about to read."""

    x: Place
    columns: int
    norm: NormWeights | None
    weights: tuple[str, ...]

    def reads(self) -> list[Place]:
        return [self.x]


@dataclass
class NormStep(MappingStep):
    """RMS norm over groups of columns."""

    norm: NormWeights
    x: Place
    out: Place
    width: int
    group: int


@dataclass
class LinearPart:
    """A range of one weight's rows, where the result goes, and what is added to it."""

    weight: str
    row: int
    rows: int
    out: Place
    bias: str | None = None
    bias_offset: int = 0
    residual: Place | None = None


@dataclass
class LinearStep(Step):
    """norm(x) @ weights.T for several weights; ``gated``: activation(part 0) * part 1."""

    x: Place
    columns: int
    parts: list[LinearPart]
    norm: NormWeights | None = None
    gated: str | None = None

    def reads(self) -> list[Place]:
        return [self.x] + [part.residual for part in self.parts if part.residual is not None]

    def writes(self) -> list[Place]:
        return [self.parts[0].out] if self.gated else [part.out for part in self.parts]


@dataclass
class AttentionStep(Step):
    """Norm and rotary of q and k (in place), append to the cache, attention."""

    q: Place
    k: Place
    v: Place
    out: Place
    heads: int
    kv_heads: int
    head_dim: int
    layer: int
    window: int | None
    scale: float
    softcap: float | None
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    rope: RopeConfig | None

    def reads(self) -> list[Place]:
        return [self.q, self.k, self.v]

    def writes(self) -> list[Place]:
        return [self.out]


@dataclass
class ElementwiseStep(Step):
    """``kind``: add (a + b), scale (a * factor), softcap, gated (activation(a) * b)."""

    kind: str
    a: Place
    b: Place | None
    out: Place
    width: int
    factor: float = 1.0
    activation: str = "silu"

    def reads(self) -> list[Place]:
        return [self.a] if self.b is None else [self.a, self.b]

    def writes(self) -> list[Place]:
        return [self.out]


@dataclass
class GatherColumnsStep(MappingStep):
    """Columns in the order that a permutation gives."""

    permutation: str
    x: Place
    out: Place
    width: int


@dataclass
class ScaleBySequenceStep(MappingStep):
    """Columns times scales and the weights that the row's sequence gives to LoRA adapters, then zeros."""

    slots: str
    scales: str
    x: Place
    out: Place
    width: int
    out_width: int


@dataclass
class SelectStep(MappingStep):
    """Gathers the rows whose logits are asked for."""

    x: Place
    out: Place
    width: int
