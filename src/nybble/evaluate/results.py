"""Results: what an evaluation found, as data and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nybble.evaluate.benchmark import Measurement
from nybble.evaluate.estimates import Estimate
from nybble.evaluate.weights import WeightError

SCHEMA = "nybble-evaluation/1"


@dataclass(frozen=True)
class Flip:
    """A position where a model's most probable token is not the reference's."""

    position: int
    """Index of the predicted token in the text's tokens."""
    context: str
    """The end of the text before it."""
    actual: str
    """The text's own token."""
    reference_token: str
    token: str
    reference_probability: float
    """Of the reference's token, in the reference."""
    token_in_reference: float
    """Of the model's token, in the reference."""
    probability: float
    """Of the model's token, in the model."""
    reference_token_in_model: float
    """Of the reference's token, in the model."""

    @property
    def loss(self) -> float:
        """How much less probable the model's choice is to the reference than its own."""
        return self.reference_probability - self.token_in_reference


@dataclass(frozen=True)
class Quality:
    """How a model predicts the text; the divergences are None for the reference."""

    tokens: int
    """Tokens that counted."""
    perplexity: Estimate
    perplexity_ratio: Estimate | None = None
    """To the reference's, from the differences on the same tokens."""
    kld: Estimate | None = None
    """Mean KL divergence from the reference, nats."""
    kld_median: Estimate | None = None
    kld99: Estimate | None = None
    """99th percentile."""
    kld_max: float | None = None
    top1: Estimate | None = None
    """Share of tokens where both models think the same token the most probable."""
    flips: int | None = None
    """Tokens where they do not."""

    def to_json(self) -> dict[str, Any]:
        """As an object."""
        return {
            name: value.to_json() if isinstance(value, Estimate) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class ModelResult:
    """One model of an evaluation. What was not measured, or failed, is None."""

    label: str
    model: str
    """As it was given."""
    path: str
    device: str
    format: str
    options: dict[str, str | int]
    threads: int | None
    weight_bytes: int
    parameters: int | None
    load_seconds: float
    quality: Quality | None = None
    flips: tuple[Flip, ...] = ()
    """Those where the reference was surest of its own token, the surest first."""
    prefill: Measurement | None = None
    decode: Measurement | None = None
    peak_memory_bytes: int | None = None
    """Largest resident size of the model's own process after loading, a prefill and a decode."""
    weight_errors: tuple[WeightError, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str | None = None
    """What ended the model before all windows were done."""

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of a weight, scales and everything else included."""
        return 8 * self.weight_bytes / self.parameters if self.parameters else None

    def to_json(self) -> dict[str, Any]:
        """As an object."""
        return {
            "label": self.label,
            "model": self.model,
            "path": self.path,
            "device": self.device,
            "format": self.format,
            "options": self.options,
            "threads": self.threads,
            "weight_bytes": self.weight_bytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "prefill": _rate(self.prefill),
            "decode": _rate(self.decode),
            "quality": None if self.quality is None else self.quality.to_json(),
            "flips": [asdict(flip) for flip in self.flips],
            "weight_errors": [
                {**asdict(error), "relative_error": _finite(error.relative_error)}
                for error in self.weight_errors
            ],
            "notes": list(self.notes),
            "failure": self.failure,
        }


@dataclass(frozen=True)
class Evaluation:
    """What ``nybble.evaluate`` found: the first model is the reference."""

    text: str
    """The file, or ``(text)``."""
    text_sha256: str
    tokens: int
    """Of the text, as far as it was looked at."""
    window: int
    stride: int | None
    windows: int
    scored: int
    """Tokens that counted, in all windows together."""
    models: tuple[ModelResult, ...]
    processor: str
    load_average: float | None
    """Processes that wanted a core before the evaluation began."""
    version: str
    seconds: float

    @property
    def reference(self) -> ModelResult:
        """The model that the others are compared with."""
        return self.models[0]

    @property
    def others(self) -> tuple[ModelResult, ...]:
        """All but the reference."""
        return self.models[1:]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it; docs/evaluation.md describes the fields."""
        return {
            "schema": SCHEMA,
            "text": self.text,
            "text_sha256": self.text_sha256,
            "tokens": self.tokens,
            "window": self.window,
            "stride": self.stride,
            "windows": self.windows,
            "scored": self.scored,
            "processor": self.processor,
            "load_average": self.load_average,
            "version": self.version,
            "seconds": self.seconds,
            "reference": self.reference.label,
            "models": [model.to_json() for model in self.models],
        }


def _rate(found: Measurement | None) -> dict[str, Any] | None:
    """Tokens a second, and the seconds that they come from."""
    if found is None:
        return None
    slowest, fastest = found.spread
    return {
        "tokens": found.tokens,
        "median": found.median,
        "slowest": slowest,
        "fastest": fastest,
        "seconds": list(found.seconds),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
