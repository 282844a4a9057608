"""Loading the model that a command names, with the progress of a download on standard error."""

from __future__ import annotations

import argparse
import gc
from typing import TYPE_CHECKING

from nybble.cli.options import load_options

if TYPE_CHECKING:
    from nybble.model import Model


def load(arguments: argparse.Namespace) -> Model:
    """The model that the arguments name, on the device that they name."""
    import nybble
    from nybble.hub.progress import progress_display

    # Loading makes half a million objects that stay: looking for garbage among them takes 20 ms.
    enabled = gc.isenabled()
    gc.disable()
    try:
        with progress_display() as progress:
            return nybble.load(arguments.model, progress=progress, **load_options(arguments))
    finally:
        if enabled:
            gc.enable()


def require_template(model: Model, arguments: argparse.Namespace) -> None:
    """Refuse a chat with a model that knows no chat.

    Raises:
        TemplateError: neither the model nor the user gives a chat template.
    """
    from nybble.errors import TemplateError

    checkpoint = model.checkpoint
    if arguments.chat_template is not None or checkpoint is None:
        return
    if checkpoint.chat_template is None and not checkpoint.chat_templates:
        raise TemplateError(
            f"{arguments.model} has no chat template: nybble run --raw continues a text, "
            "--chat-template chatml (or another) lets it chat all the same"
        )
