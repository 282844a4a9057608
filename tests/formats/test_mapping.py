"""Mapped files: pages that are given back are read again when they are needed."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from nybble.errors import FormatError, NotFoundError
from nybble.formats.mapping import map_file, release_pages


def resident() -> int:
    """Bytes of memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    size = 64 << 20
    content = np.arange(size // 8, dtype=np.int64)
    path = tmp_path / "x"
    path.write_bytes(content.tobytes())
    view = np.frombuffer(map_file(path, "a file"), np.int64)
    assert view.sum() == content.sum()
    before = resident() if sys.platform == "linux" else 0
    release_pages()
    if sys.platform == "linux":
        assert resident() < before - size // 2
    np.testing.assert_array_equal(view, content)


def test_files_that_were_closed_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"content")
    closed = map_file(path, "a file")
    closed.close()
    dropped = map_file(path, "a file")
    assert isinstance(dropped, mmap.mmap)
    del dropped
    gc.collect()
    release_pages()


def test_what_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="the file is empty"):
        map_file(tmp_path / "empty", "a GGUF file")
    with pytest.raises(NotFoundError, match="no such file; a GGUF file is needed"):
        map_file(tmp_path / "none", "a GGUF file")
    with pytest.raises(NotFoundError, match="is a folder; a GGUF file is needed"):
        map_file(tmp_path, "a GGUF file")
