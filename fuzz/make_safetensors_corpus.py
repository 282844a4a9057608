"""Writes the seed files in fuzz/corpus/safetensors: small and valid, each showing other parts of the format.

python fuzz/make_safetensors_corpus.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from nybble.formats.safetensors.header import DTYPE_BITS  # noqa: E402
from support.safetensors_bytes import build, tensor  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus" / "safetensors"


def every_dtype() -> tuple[dict[str, object], bytes]:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "жук": "☃"}}
    end = 0
    for dtype, bits in sorted(DTYPE_BITS.items(), key=lambda item: -item[1]):
        begin, end = end, end + 8 * bits // 8
        header[f"a.{dtype}"] = tensor(dtype, [2, 4], begin, end)
    return header, bytes(i % 251 for i in range(end))


def files() -> dict[str, bytes]:
    header, data = every_dtype()
    few = {
        "model.embed_tokens.weight": tensor("F32", [3, 5], 0, 60),
        "model.norm.weight": tensor("BF16", [5], 60, 70),
    }
    odd = {"b": tensor("BF16", [1], 1, 3), "a": tensor("I8", [1], 0, 1), "c": tensor("F32", [], 3, 7)}
    none = {
        "x": tensor("F16", [0, 7], 0, 0),
        "y": tensor("I64", [1, 1, 1, 1], 0, 8),
        "z": tensor("F4", [0], 8, 8),
    }
    spaces = b'{ "t" :\n{ "shape" : [ 2 ], "dtype":"U8" ,"data_offsets": [0 , 2], "more": 1 }}'
    return {
        "empty": build({}),
        "metadata": build({"__metadata__": {"format": "pt", "": "", "note": "a\\\"b\u0000"}}),
        "types": build(header, data),
        "model": build({"__metadata__": {"format": "pt"}, **few}, bytes(range(70)), 64),
        "misaligned": build(odd, bytes(7), 1),
        "no_elements": build(none, bytes(8)),
        "spaces": build(spaces, b"ab"),
    }  # fmt: skip


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (CORPUS / f"{name}.safetensors").write_bytes(content)
        print(f"{name}.safetensors: {len(content)} bytes")


if __name__ == "__main__":
    main()
