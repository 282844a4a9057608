"""Fixtures that many tests share: the real models.

``NYBBLE_TEST_MODELS`` names a folder with the GGUF files; without it SmolLM2 comes from nybble's
cache, or is downloaded into it unless ``NYBBLE_OFFLINE`` is set. Where a model cannot be had its
tests are skipped and say why; with ``NYBBLE_REQUIRE_MODELS=1`` they fail.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests/support

from support.required import missing

# A shell's background job starts with Ctrl-C ignored and hands that to its children; the tests of
# Ctrl-C want programs as a terminal starts them.
signal.signal(signal.SIGINT, signal.default_int_handler)

FILES = {
    "smollm2": "smollm2-135m-instruct-q4_1.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
}


def model_path(name: str) -> Path:
    """The file of a real model, or a skip or failure that says what to do."""
    folder = os.environ.get("NYBBLE_TEST_MODELS")
    if folder:
        path = Path(folder) / FILES[name]
        if path.is_file():
            return path
        _missing(f"{path} does not exist (NYBBLE_TEST_MODELS={folder})")
    from nybble import hub
    from nybble.errors import NybbleError

    try:
        return hub.resolve(name)
    except NybbleError as error:
        _missing(f"{name}: {error}")


def _missing(reason: str) -> NoReturn:
    remedy = f"set NYBBLE_TEST_MODELS to a folder with {', '.join(FILES.values())}"
    missing("NYBBLE_REQUIRE_MODELS", reason, remedy)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return model_path("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma-3-270M, Q4_K_M."""
    return model_path("gemma3-270m")
