"""The line that shows how far work that goes layer by layer is: calibrations, quantizations."""

from __future__ import annotations

import sys
from time import monotonic
from typing import TYPE_CHECKING

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.quantize.calibrate import LayerProgress

_SECONDS = 10.0  # between lines where standard error is no terminal


class LayerDisplay:
    """A line that is rewritten on a terminal, a line every ten seconds elsewhere; on standard error.

    Args:
        action: what is going on (``calibrating``).
        quiet: show nothing.
    """

    def __init__(self, action: str, *, quiet: bool) -> None:
        self._action = action
        self._terminal = sys.stderr.isatty()
        self._quiet = quiet
        self._printed: float | None = None

    def __call__(self, progress: LayerProgress) -> None:
        """Show how far it is."""
        from nybble.hub.progress import format_seconds

        now = monotonic()
        if self._quiet or (
            self._printed is not None and now - self._printed < (0.1 if self._terminal else _SECONDS)
        ):
            return
        self._printed = now
        where = (
            "output matrix"
            if progress.layer == progress.num_layers
            else f"layer {progress.layer + 1} of {progress.num_layers}"
        )
        left = "" if progress.seconds_left is None else f", {format_seconds(progress.seconds_left)} left"
        text = f"{self._action}: {where}, {progress.fraction:.0%}{left}"
        if self._terminal:
            sys.stderr.write(f"\r{text:<60}")
            sys.stderr.flush()
        else:
            console.note(text)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._terminal and self._printed is not None:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self._printed = None
