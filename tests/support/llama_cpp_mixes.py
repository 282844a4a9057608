"""Runs in an interpreter that has llama_cpp: which type llama.cpp's mixes give to each matrix.

Usage: python llama_cpp_mixes.py OUT.json MIX,... MODEL.gguf ... OUT becomes {model: {mix: {tensor: type}}},
a mix's name with ``+importance`` where llama.cpp was given an importance matrix; names that llama.cpp does
not have are left out. Nothing is quantized: a dry run says what would be.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path

import llama_cpp

PREFIX = "LLAMA_FTYPE_MOSTLY_"
LINE = re.compile(
    r"\] (\S+) +- \[ *\d+, *(\d+), .*type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)

lines: list[str] = []


@llama_cpp.llama_log_callback
def keep(_level: int, text: bytes, _data: object) -> None:
    """A message of llama.cpp."""
    lines.append(text.decode())


def importance() -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    """A matrix of one linear, and the end; that there is one is all that the choice asks."""
    weights = (ctypes.c_float * 256)(*[1.0] * 256)
    entries = (llama_cpp.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].data, entries[0].size = b"blk.0.attn_q.weight", weights, 256
    return entries


def choices(model: str, kind: int, *, weighted: bool) -> dict[str, str]:
    """Types by name of the model's matrices."""
    entries = importance()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = kind, 1, True
    if weighted:
        params.imatrix = entries
    lines.clear()
    status = llama_cpp.llama_model_quantize(model.encode(), b"unused.gguf", params)
    if status:
        raise SystemExit("".join(lines))
    found = LINE.findall("".join(lines))
    return {name: (new or old).lower() for name, rows, old, new in found if rows != "1"}


def main() -> None:
    """All mixes of all models."""
    llama_cpp.llama_log_set(keep, None)
    wanted = sys.argv[2].split(",")
    kinds = {mix: getattr(llama_cpp, PREFIX + mix.upper(), None) for mix in wanted}
    result = {
        Path(model).stem: {
            mix + "+importance" * weighted: choices(model, kind, weighted=weighted)
            for mix, kind in kinds.items()
            for weighted in (False, True)
            if kind is not None
        }
        for model in sys.argv[3:]
    }
    Path(sys.argv[1]).write_text(json.dumps(result), encoding="ascii")


main()
