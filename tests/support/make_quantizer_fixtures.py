"""Writes tests/data/llama.cpp/quantizer_errors.json: how large llama.cpp's errors are on a few matrices.

    PYTHONPATH=src:tests python tests/support/make_quantizer_fixtures.py LIBGGML_BASE

``LIBGGML_BASE`` is ``libggml-base.so`` in the ``lib`` folder of an installed ``llama_cpp``. For every type,
matrix and kind of weighing the file has sqrt(sum w (x - y)^2 / sum w x^2).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nybble.quantize.blocks import BLOCK_TYPES
from support.ggml_quantizer import NEEDS_IMPORTANCE, GgmlQuantizer
from support.quantizer_matrices import MATRICES, importance_of, matrix, relative_error

TARGET = Path(__file__).parents[1] / "data" / "llama.cpp" / "quantizer_errors.json"


def main() -> int:
    """Ask llama.cpp and write."""
    theirs = GgmlQuantizer(Path(sys.argv[1]))
    found: dict[str, dict[str, float]] = {}
    for name in BLOCK_TYPES:
        found[name] = {}
        for kind in MATRICES:
            values = matrix(kind)
            for weighed in (False, True):
                if name in NEEDS_IMPORTANCE and not weighed:
                    continue
                importance = importance_of(values) if weighed else None
                made = theirs.quantize(values, name, importance)
                error = relative_error(values, name, made, importance)
                found[name][f"{kind}, importance" if weighed else kind] = round(error, 7)
    TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
