"""Conversion between formats: what each tensor becomes, the work, the report and the manifest.

The package itself can be called: ``nybble.convert(source, target, to="gguf")`` is ``convert.convert``. The
name is both the library's function and the place of its parts, whichever is imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is called like the function of its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As ``nybble.convert.convert.convert``."""
        from nybble.convert.convert import convert

        return convert(*args, **options)


sys.modules[__name__].__class__ = _Callable
