"""safetensors files as bytes, made by hand: whatever header one likes, right or wrong."""

from __future__ import annotations

import json


def build(header: dict[str, object] | bytes, data: bytes = b"", padding: int = 8) -> bytes:
    """A file with this header (an object, or its text) and data; spaces fill up to ``padding``."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % padding)
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    """An entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
