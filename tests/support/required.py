"""What a test needs and does not find: a skip that says why, or a failure where it must not be skipped."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(variable: str, reason: str, remedy: str = "", *, module: bool = False) -> NoReturn:
    """Skips, or fails where the environment variable says that nothing may be missing.

    ``module``: called while a test file is imported, which is then left out as a whole.
    """
    if os.environ.get(variable, "") not in ("", "0"):
        pytest.fail(f"{variable} is set, but {reason}", pytrace=False)
    pytest.skip(f"{reason}; {remedy}" if remedy else reason, allow_module_level=module)
