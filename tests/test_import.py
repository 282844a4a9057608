"""``import nybble`` is cheap and offers the names of the simple API."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import nybble

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

# Runs in a fresh interpreter: modules that `import nybble` brought, and its time in seconds.
_PROBE = """
import sys, time, json
before = set(sys.modules)
started = time.perf_counter()
import nybble
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def _probe() -> dict:
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_import_brings_nothing_heavy():
    modules = _probe()["modules"]
    roots = {name.partition(".")[0] for name in modules}
    assert not roots & {"numpy", "tokenizers", "jinja2", "huggingface_hub", "rich", "torch", "asyncio"}
    assert [name for name in modules if name.startswith("nybble")] == ["nybble"]


def test_import_takes_less_than_30_ms():
    # The median of five: another process may take the processor away for longer than that.
    assert statistics.median(_probe()["seconds"] for _ in range(5)) < 0.03


def test_every_public_name_is_there():
    for name in nybble.__all__:
        assert getattr(nybble, name) is not None
        assert name in dir(nybble)
    assert callable(nybble.load)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = nybble.lod


def test_the_version_is_the_projects():
    assert re.search(r'^version = "(.+)"$', PYPROJECT.read_text(), re.MULTILINE)[1] == nybble.__version__
