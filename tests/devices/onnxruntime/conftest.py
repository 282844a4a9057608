"""Sessions on the tiny folders of tests/data/onnxruntime (made by tests/support/make_onnx_fixtures.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble import devices
from nybble.formats.onnx.folder import open_onnx_folder

DATA = Path(__file__).parents[2] / "data" / "onnxruntime"

pytest.importorskip("onnxruntime")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny folder whose genai_config.json a function may change."""

    def copy(name: str, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
        target = tmp_path / name
        shutil.copytree(DATA / name, target)
        if change is not None:
            path = target / "genai_config.json"
            config = json.loads(path.read_text())
            change(config)
            path.write_text(json.dumps(config))
        return target

    return copy


def start(path: Path, **options: Any):
    """A session on the CPU provider."""
    return devices.compile(open_onnx_folder(path), device="onnxruntime:cpu", threads=1, **options)
