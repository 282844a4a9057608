"""Writes iq_grids.h from the codebooks in nybble.checkpoint.encodings.iq_grids.

python native/kernels/make_iq_grids.py            # rewrite the header
python native/kernels/make_iq_grids.py --check    # fail if it is out of date
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADER = HERE / "iq_grids.h"
SOURCE = HERE.parents[1] / "src" / "nybble" / "checkpoint" / "encodings" / "iq_grids.py"

INTRODUCTION = """\
// Codebooks of the IQ1, IQ2 and IQ3 encodings, sign patterns, and the levels of 4-bit codes.
// Written by make_iq_grids.py: do not edit.
//
// The numbers are those of ggml-common.h (https://github.com/ggml-org/llama.cpp),
// MIT licence, Copyright (c) 2023-2026 The ggml authors.
//
// An entry packs its values into one integer: value i is the int8 in bits 8i to 8i + 7, so on a
// little-endian machine the entry's bytes in memory are the values in order. Include this only
// in translation units that use it: the tables have internal linkage.
#pragma once

#include <cstdint>

namespace nybble::grids {
"""


def rows(values: list[str], each: int) -> str:
    """The values as the lines of a C++ initializer, `each` to a line."""
    lines = [", ".join(values[i : i + each]) + "," for i in range(0, len(values), each)]
    return "\n".join("    " + line for line in lines)


def header() -> str:
    """The whole text of iq_grids.h."""
    tables = runpy.run_path(str(SOURCE))
    text = INTRODUCTION
    for name in tables["GRID_NAMES"]:
        grid = tables["grid"](name)
        entries, values = grid.shape
        bits = 8 * values
        digits = 2 * values
        packed = [f"0x{int.from_bytes(row.tobytes(), 'little'):0{digits}x}" for row in grid]
        text += f"\n// {entries} entries of {values} values.\n"
        text += f"alignas(64) constexpr uint{bits}_t {name}[{entries}] = {{\n"
        text += rows(packed, 5 if values == 8 else 8) + "\n};\n"
    signs = tables["signs"]() < 0
    masks = [f"0x{sum(int(bit) << i for i, bit in enumerate(row)):02x}" for row in signs]
    text += "\n// Sign pattern of a 7-bit index: bit i set makes value i negative; an even number is set.\n"
    text += "alignas(64) constexpr uint8_t ksigns[128] = {\n" + rows(masks, 16) + "\n};\n"
    for name, title, levels in (
        ("kvalues_iq4nl", "Levels of the 4-bit codes of iq4_nl and iq4_xs.", tables["IQ4_LEVELS"]),
        (
            "kvalues_mxfp4",
            "4-bit floats (e2m1), doubled: mxfp4 and nvfp4; halve the scale to suit.",
            tables["E2M1_LEVELS"],
        ),
    ):
        text += f"\n// {title}\nalignas(16) constexpr int8_t {name}[16] = {{\n"
        text += rows([str(value) for value in levels], 16) + "\n};\n"
    return text + "\n}  // namespace nybble::grids\n"


def main() -> int:
    """Write or check the header; returns the exit code."""
    text = header()
    if "--check" in sys.argv[1:]:
        if HEADER.read_text(encoding="utf-8") != text:
            print(f"{HEADER} is out of date: run {Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    HEADER.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
