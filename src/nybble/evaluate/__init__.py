"""Measuring models: how fast they run, and what a change of their weights cost.

The package itself can be called: ``nybble.evaluate(models, text=...)`` is ``compare.evaluate``. The name
is both the library's function and the place of its parts, whichever is imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is called like the function of its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As ``nybble.evaluate.compare.evaluate``."""
        from nybble.evaluate.compare import evaluate

        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable
