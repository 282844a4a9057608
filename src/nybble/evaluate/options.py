"""EvaluationOptions: every choice that a caller has about an evaluation, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nybble.evaluate.specs import ModelSpec
from nybble.evaluate.windows import DEFAULT_WINDOW, check_sizes


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate. Raises ValueError where a value is out of range."""

    window: int = DEFAULT_WINDOW
    """Tokens of a window; see ``windows`` for how a text is cut."""
    stride: int | None = None
    """Tokens between the beginnings of windows; None: side by side, their second halves count."""
    tokens: int | None = None
    """Use the first so many tokens of the text."""
    windows: int | None = None
    """Use the first so many windows."""
    device: str = "cpu"
    """Where models run that name no device."""
    threads: int | None = None
    """As ``nybble.load``, for models that do not say otherwise; also of what compares the logits."""
    precision: str | None = None
    """As ``nybble.load``, for models on ``cpu`` that do not say otherwise."""
    kv_cache: str | None = None
    """As ``nybble.load``, for models on ``cpu`` that do not say otherwise."""
    speed: bool = True
    """Measure prefill (one window), decode and peak memory too."""
    repetitions: int = 3
    """How often each is timed."""
    weights: bool = False
    """Compare the models' weights with the reference's too."""
    flips: int = 20
    """How many positions are listed where the most probable token changed."""

    def __post_init__(self) -> None:
        check_sizes(self.window, self.stride, self.windows)
        if self.repetitions < 1 or self.flips < 0 or (self.tokens is not None and self.tokens < 1):
            raise ValueError("repetitions and tokens are at least 1, and flips at least 0")

    def of_model(self, spec: ModelSpec) -> Mapping[str, str | int]:
        """The options of one model: its own, and of those for all what its device knows."""
        name = spec.device or self.device
        common: dict[str, str | int | None] = {}
        if name == "cpu":
            common = {"precision": self.precision, "kv_cache": self.kv_cache}
        if name != "reference":
            common["threads"] = self.threads
        return {**{key: value for key, value in common.items() if value is not None}, **spec.options}
