"""Squared error and time of every GGUF type's quantizer, next to llama.cpp's on the same matrix.

    python bench/quantize_types.py --library LIBGGML_BASE [--rows 2048] [--columns 2048] [TYPE ...]
    python bench/quantize_types.py --library LIBGGML_BASE --model MODEL.gguf --tensor NAME

``LIBGGML_BASE`` is ``libggml-base.so`` in the ``lib`` folder of an installed ``llama_cpp``. Both get
the same threads (llama.cpp's quantizer has none of its own: rows are dealt out, as llama-quantize does).

The matrix: normal values (``--kind normal``), heavy tails (Student's t with 4 degrees of freedom), or a
tensor of a model, dequantized, its columns scaled by random factors so that it lies on no grid. Importance:
the squares of heavy-tailed numbers. ``error`` is sqrt(sum w (x - y)^2 / sum w x^2), in percent; ``of
llama.cpp's`` below 1 is better. Times are the best of ``--repeat``, in nanoseconds a weight. ``--clock cpu``
counts the threads' processor time instead, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from harness import add_common_arguments, facts, show, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from nybble.checkpoint.encodings import ENCODINGS
from nybble.checkpoint.encodings.base import Bytes
from nybble.quantize.blocks import BLOCK_TYPES, quantize_blocks
from support.ggml_quantizer import NEEDS_IMPORTANCE, GgmlQuantizer

Floats = npt.NDArray[np.float32]
Clock = Callable[[], float]


def matrix_of(arguments: argparse.Namespace) -> Floats:
    """The values to quantize."""
    random = np.random.RandomState(1)
    if arguments.model is None:
        shape = (arguments.rows, arguments.columns)
        values = random.standard_normal(shape) if arguments.kind == "normal" else random.standard_t(4, shape)
        return (values * 0.02).astype(np.float32)
    from nybble.loading import read_checkpoint

    tensor = read_checkpoint(arguments.model).tensors[arguments.tensor]
    values = tensor.dequantize().reshape(tensor.shape)[: arguments.rows]
    factors = np.exp(random.standard_normal(values.shape[1]) * 0.2)
    return (values * factors).astype(np.float32)


def relative_error(values: Floats, decoded: Floats, importance: Floats | None) -> float:
    """In percent."""
    weights = 1.0 if importance is None else importance.astype(np.float64)
    difference = values.astype(np.float64) - decoded.reshape(values.shape)
    return 100 * float(
        np.sqrt((weights * difference**2).sum() / (weights * values.astype(np.float64) ** 2).sum())
    )


def measured(
    work: Callable[[], Bytes], values: Floats, name: str, importance: Floats | None, clock: Clock, repeat: int
) -> tuple[float, float]:
    """The error of what ``work`` makes, in percent, and its best time in nanoseconds a weight."""
    times = []
    for _ in range(repeat):
        start = clock()
        made = work()
        times.append(clock() - start)
    error = relative_error(values, ENCODINGS[name].dequantize(made), importance)
    return error, 1e9 * min(times) / values.size


def compare(
    theirs: GgmlQuantizer, values: Floats, name: str, importance: Floats | None, arguments: argparse.Namespace
) -> dict[str, object]:
    """One row of the table."""
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    def ours() -> Bytes:
        return quantize_blocks(values, name, importance=importance, threads=arguments.threads)

    error, ns = measured(ours, values, name, importance, clock, arguments.repeat)
    row: dict[str, object] = {"type": name, "importance": "no" if importance is None else "yes"}
    row.update({"error %": round(error, 3), "of llama.cpp's": "-", "ns": round(ns, 2)})
    if importance is None and name in NEEDS_IMPORTANCE:
        return row

    def peer() -> Bytes:
        return theirs.quantize(values, name, importance, arguments.threads)

    # Codebooks take long: once is enough; making llama.cpp's tables does not count.
    theirs.prepare(name)
    repeat = 1 if name.startswith("iq") else arguments.repeat
    their_error, their_ns = measured(peer, values, name, importance, clock, repeat)
    row["of llama.cpp's"] = round(error / their_error, 4)
    row.update({"llama.cpp ns": round(their_ns, 2), "times as fast": round(their_ns / ns, 1)})
    return row


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", default=BLOCK_TYPES)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--kind", choices=["normal", "tails"], default="normal")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tensor", default="model.layers.0.mlp.down_proj.weight")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    theirs = GgmlQuantizer(arguments.library)
    values = matrix_of(arguments)
    importance = (np.random.RandomState(2).standard_t(4, values.shape[1]) ** 2 + 0.01).astype(np.float32)
    results = [
        compare(theirs, values, name, weights, arguments)
        for name in arguments.types
        if values.shape[1] % ENCODINGS[name].block_size == 0
        for weights in (None, importance)
    ]
    heading = list(max(results, key=len))
    lines = [[row.get(column, "-") for column in heading] for row in results]
    report = {"machine": facts(), "shape": list(values.shape), "results": results}
    show(arguments, report, table(heading, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
