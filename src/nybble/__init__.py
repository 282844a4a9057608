"""nybble: take a small language model from a checkpoint to any format and run it fast.

    import nybble
    model = nybble.load("smollm2")
    print(model.chat([{"role": "user", "content": "Hi"}]).text)

Names are imported when they are first used, so that ``import nybble`` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost more than all the rest
if TYPE_CHECKING:
    from typing import Any

    _core: Any  # the native module; said before the imports below, which import it

    from nybble.convert.convert import convert as convert
    from nybble.errors import NybbleError as NybbleError
    from nybble.evaluate.compare import evaluate as evaluate
    from nybble.generate.generation import Generation as Generation
    from nybble.generate.generation import Stream as Stream
    from nybble.generate.options import GenerationOptions as GenerationOptions
    from nybble.generate.reply import Reply as Reply
    from nybble.loading import load as load
    from nybble.model import Model as Model
    from nybble.quantize.quantize import quantize as quantize

__version__ = "0.1.0"

_WHERE = {
    "NybbleError": "nybble.errors",
    "Generation": "nybble.generate.generation",
    "Stream": "nybble.generate.generation",
    "GenerationOptions": "nybble.generate.options",
    "Reply": "nybble.generate.reply",
    "load": "nybble.loading",
    "Model": "nybble.model",
}

_PACKAGES = ("convert", "evaluate", "quantize")
"""Packages that are functions too: ``nybble.convert(...)``, and ``nybble.convert.verify`` beside it."""

__all__ = [
    "Generation",
    "GenerationOptions",
    "Model",
    "NybbleError",
    "Reply",
    "Stream",
    "__version__",
    "convert",
    "evaluate",
    "load",
    "quantize",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _PACKAGES:
        return importlib.import_module(f"nybble.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
