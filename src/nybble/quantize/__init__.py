"""Quantization: methods, calibration, importance matrices, recipes, and the work as a whole.

The package itself can be called: ``nybble.quantize(source, target, "q4_k_m")`` is ``quantize.quantize``. The
name is both the library's function and the place of its parts, whichever is imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is called like the function of its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As ``nybble.quantize.quantize.quantize``."""
        from nybble.quantize.quantize import quantize

        return quantize(*args, **options)


sys.modules[__name__].__class__ = _Callable
