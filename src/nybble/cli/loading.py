"""Loading the model that a command names, with the progress of a download on standard error."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nybble.cli.options import load_options

if TYPE_CHECKING:
    from nybble.model import Model


def load(arguments: argparse.Namespace) -> Model:
    """The model that the arguments name, on the device that they name."""
    import nybble
    from nybble.hub.progress import progress_display

    with progress_display() as progress:
        return nybble.load(arguments.model, progress=progress, **load_options(arguments))
