"""What a quantization looks at besides the weights: the text of its calibration, and its windows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nybble.checkpoint.checkpoint import Checkpoint
from nybble.devices.cpu import longest_context
from nybble.errors import UnsupportedError
from nybble.quantize.calibrate import WINDOW, WINDOWS, calibration_windows
from nybble.quantize.calibration_text import Tokens


@dataclass(frozen=True)
class CalibrationOptions:
    """What a method that calibrates looks at.

    ``text``: files, folders or JSON lines of chats; none: nybble's own text. ``windows`` of ``window``
    tokens, drawn by ``seed``; ``precision`` of the model: ``fast`` or ``f32``.
    """

    text: Sequence[str | os.PathLike[str]] = ()
    windows: int = WINDOWS
    window: int = WINDOW
    seed: int = 0
    precision: str = "fast"

    def to_json(self) -> dict[str, Any]:
        """As a manifest has it: names of texts, without their folders."""
        return {
            "text": [Path(item).name for item in self.text] or ["nybble"],
            **{key: getattr(self, key) for key in ("windows", "window", "seed", "precision")},
        }


def windows_of(checkpoint: Checkpoint, options: CalibrationOptions, *, singles: int = 0) -> list[Tokens]:
    """The windows of a calibration, and windows of ``singles`` different tokens of them, alone."""
    if checkpoint.tokenizer is None:
        raise UnsupportedError("the model has no tokenizer, which a calibration needs")
    most = longest_context(checkpoint.config)
    if not 2 <= options.window <= most:
        raise UnsupportedError(f"windows of {options.window} tokens: the model takes 2 to {most} at a time")
    windows = calibration_windows(
        checkpoint,
        checkpoint.tokenizer.build(),
        text=options.text,
        windows=options.windows,
        window=options.window,
        seed=options.seed,
    )
    tokens = np.unique(np.concatenate([np.asarray(window) for window in windows]))
    chosen = np.random.default_rng(options.seed).permutation(tokens)[:singles]
    return [*windows, *(np.array([token], windows[0].dtype) for token in chosen)]
